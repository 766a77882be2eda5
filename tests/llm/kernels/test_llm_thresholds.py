"""Token counts from which one way of computing is faster: what follows, and how it is kept."""

import json

import pytest

from layer_streamer.llm.kernels.thresholds import (
    NEVER,
    PRODUCT_TOKENS,
    TILE_TOKENS,
    Thresholds,
    find_thresholds,
    record_path,
    save_thresholds,
    thresholds,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    thresholds.cache_clear()
    yield
    thresholds.cache_clear()


def products(kind: str, *pairs: tuple[int, float, float]) -> list[dict]:
    return [{"format": kind, "tokens": n, "fused_us": f, "plain_us": p} for n, f, p in pairs]


def with_tiles(kind: str, *rows: tuple[int, float | None, float, float]) -> list[dict]:
    """Rows of (tokens, few, tiles, plain); None: not measured."""
    return [
        {"format": kind, "tokens": n, "tiles_us": t, "plain_us": p}
        | ({} if f is None else {"fused_us": f})
        for n, f, t, p in rows
    ]


def kernels(kind: str, *pairs: tuple[int, float, float]) -> list[dict]:
    return [{"kernel": kind, "tokens": n, "fused_us": f, "plain_us": p} for n, f, p in pairs]


def test_a_product_is_fused_up_to_the_first_count_at_which_it_was_not_faster():
    rows = products("ct4", (1, 1, 5), (2, 2, 5), (4, 6, 5), (8, 4, 5))
    assert find_thresholds(rows, []).product["ct4"] == 2


def test_a_product_that_is_slower_from_the_start_is_never_fused():
    assert find_thresholds(products("ct4", (1, 5, 5), (2, 1, 5)), []).product["ct4"] == 0


def test_formats_that_were_not_measured_keep_their_defaults():
    found = find_thresholds(products("ct4", (1, 1, 5)), [])
    assert found.product == PRODUCT_TOKENS | {"ct4": 1}
    assert (found.norm, found.swiglu) == (Thresholds().norm, Thresholds().swiglu)


@pytest.mark.parametrize(
    ("rows", "few", "tiles"),
    [
        ([(1, 1, 2, 9), (4, 3, 2, 9), (16, 12, 3, 9), (64, None, 5, 9), (128, None, 9, 9)], 1, 64),
        ([(1, 1, 2, 9), (4, 2, 2, 9), (16, 12, 9, 9), (64, None, 5, 9)], 1, 4),
        ([(1, 1, 9, 2), (4, 2, 9, 3), (16, 12, 9, 3)], 4, 0),
        ([(1, 1, 9, 5), (4, 2, 3, 5), (16, 12, 4, 5)], 4, 16),
        ([(1, 2, 1, 9), (4, 1, 2, 9)], 0, 4),
    ],
)
def test_tiles_serve_from_the_products_count_to_the_first_at_which_unpacking_is_as_fast(
    rows, few, tiles
):
    found = find_thresholds(with_tiles("Q4_K", *rows), [])
    assert (found.product["Q4_K"], found.tiles["Q4_K"]) == (few, tiles)


def test_a_format_that_only_tiles_multiply_has_no_other_count():
    found = find_thresholds(with_tiles("Q6_K", (1, None, 1, 2), (8, None, 1, 2)), [])
    assert found.tiles == TILE_TOKENS | {"Q6_K": 8}
    assert found.product == PRODUCT_TOKENS


def test_a_record_of_before_tiles_is_read_with_their_defaults():
    record_path().parent.mkdir(parents=True)
    record_path().write_text('{"A": {"product": {"Q4_K": 2}, "norm": 3, "swiglu": 1}}')
    assert thresholds("A") == Thresholds(product={"Q4_K": 2}, norm=3)
    assert thresholds("A").tiles == TILE_TOKENS


@pytest.mark.parametrize(
    ("pairs", "fewest"),
    [
        ([(1, 1, 2), (2, 1, 2)], 1),
        ([(1, 3, 2), (2, 1, 2), (4, 1, 2)], 2),
        ([(1, 1, 2), (2, 3, 2), (4, 1, 2)], 4),
        ([(1, 3, 2), (2, 3, 2)], NEVER),
    ],
)
def test_one_kernel_serves_from_the_count_since_which_it_has_been_faster(pairs, fewest):
    found = find_thresholds([], kernels("norm", *pairs) + kernels("swiglu", (1, 1, 2)))
    assert (found.norm, found.swiglu) == (fewest, 1)


def test_what_is_kept_for_a_gpu_is_used_for_it_alone():
    measured = Thresholds(product={"ct4": 7}, norm=3, swiglu=5)
    save_thresholds("A", measured)
    save_thresholds("B", Thresholds(norm=9))
    assert thresholds("A") == measured
    assert thresholds("B").norm == 9
    assert thresholds("C") == Thresholds()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"A": {"norm": -1}}', '{"A": {"other": 1}}', '{"A": {"product": 3}}']
)
def test_a_record_that_makes_no_sense_is_not_used(text, caplog):
    record_path().parent.mkdir(parents=True)
    record_path().write_text(text)
    assert thresholds("A") == Thresholds()
    assert text == "[]" or "not used" in caplog.text


def test_a_record_that_cannot_be_read_is_replaced_whole(caplog):
    record_path().parent.mkdir(parents=True)
    record_path().write_text("{")
    save_thresholds("A", Thresholds(norm=2))
    assert json.loads(record_path().read_text())["A"]["norm"] == 2
    assert [path.name for path in record_path().parent.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize("count", [-1, 1.5, True, "1"])
def test_a_threshold_that_is_no_count_is_refused_by_name(count):
    with pytest.raises(ValueError, match="swiglu="):
        Thresholds(swiglu=count)
    with pytest.raises(ValueError, match=r"product\[ct8\]="):
        Thresholds(product={"ct8": count})
    with pytest.raises(ValueError, match=r"tiles\[ct8\]="):
        Thresholds(tiles={"ct8": count})
