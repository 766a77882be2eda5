"""Keys and values in host memory equal those on the device, bit for bit, whatever happens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint, tiny_model
from one_sequence import Story

from layer_streamer.llm.kv import rows as rows_module
from layer_streamer.llm.passes.chunking import Chunking

WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1}
LAYERS = (0, 1, 2)
KINDS = {"full": {}, "windows": WINDOW}


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Qwen2; with windows, its first layer sees all, the others 20 tokens: a ring of 512,
    which long rows go round several times."""
    model = tiny_model("qwen2", max_position_embeddings=2048, **KINDS[request.param])
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), model), model


def tell(path: Path, config: Any, seed: int, steps: int = 14, **options: Any) -> list[torch.Tensor]:
    options = {"tokens": 3072, "max_rows": 4, "chunking": Chunking(tokens=64)} | options
    with open_runner(path, config, **options) as runner:
        return Story(seed, steps).tell(runner)


@pytest.mark.parametrize(
    ("seed", "host_layers"), [(0, LAYERS), (1, LAYERS), (2, (1,)), (3, (0, 2))]
)
def test_host_equals_device_bit_for_bit_through_growth_rollback_and_change_of_rows(
    model: tuple[Path, Any], seed: int, host_layers: tuple[int, ...]
) -> None:
    path, network = model
    expected = tell(path, network.config, seed)
    found = tell(path, network.config, seed, host_layers=host_layers)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pools", [{"n_gpu": 0}, {"n_gpu": 9, "n_cpu_pinned": 9, "n_cpu": 9}])
def test_pools_of_any_size_give_the_same(model: tuple[Path, Any], pools: dict[str, int]) -> None:
    path, network = model
    expected = tell(path, network.config, 7)
    found = tell(path, network.config, 7, host_layers=LAYERS, **pools)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_in_a_steady_run_everything_has_been_prefetched(model: tuple[Path, Any]) -> None:
    path, network = model
    options = {"tokens": 512, "max_rows": 2, "host_layers": LAYERS}
    with open_runner(path, network.config, **options) as runner:
        rows = [runner.kv.rows.add(200) for _ in range(2)]
        for ids in ([5] * 40, [6], [7], [8, 9], [3]):
            runner.forward([(row, ids) for row in rows if row is not None])
        assert runner.kv.host is not None and runner.kv.host.late_nbytes == 0


@pytest.mark.parametrize(
    "chunkings",
    [
        (Chunking(tokens=7), Chunking(group_rows=True)),
        pytest.param((Chunking(tokens=1),), marks=pytest.mark.slow, id="each token alone"),
    ],
)
def test_chunks_and_grouped_rows_change_nothing_but_rounding(
    model: tuple[Path, Any], chunkings: tuple[Chunking, ...]
) -> None:
    path, network = model
    expected = tell(path, network.config, 11, 4, chunking=Chunking(tokens=10_000))
    for chunking in chunkings:
        found = tell(path, network.config, 11, 4, chunking=chunking)
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors) <= 1e-5


@pytest.mark.parametrize("chunking", [Chunking(tokens=64), Chunking(group_rows=True)])
def test_blocks_may_lie_anywhere(
    model: tuple[Path, Any], chunking: Chunking, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = model
    expected = tell(path, network.config, 5)
    dice = random.Random(5)

    def anywhere(taken: set[int], total: int, count: int) -> tuple[int, ...] | None:
        free = [block for block in range(total) if block not in taken]
        return tuple(dice.sample(free, count)) if count <= len(free) else None

    monkeypatch.setattr(rows_module, "free_blocks", anywhere)
    for host_layers in ((), (0, 2)):
        found = tell(path, network.config, 5, chunking=chunking, host_layers=host_layers)
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors) <= 1e-5


def test_int8_stays_near_and_takes_a_quarter_of_float32(model: tuple[Path, Any]) -> None:
    path, network = model
    expected = tell(path, network.config, 3)
    found = tell(path, network.config, 3, host_layers=LAYERS, int8=True)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert 0 < max(errors) < 0.1
    taken = []
    for int8 in (False, True):
        with open_runner(
            path, network.config, tokens=1024, host_layers=LAYERS, int8=int8
        ) as runner:
            row = runner.kv.rows.add(1024)
            assert row is not None
            runner.forward([(row, [1] * 1024)])
            assert runner.kv.host is not None
            taken.append(runner.kv.host.host_nbytes)
    assert taken[1] <= 0.3 * taken[0]


def test_a_pass_that_fails_in_any_layer_leaves_the_rows_as_they_were(
    model: tuple[Path, Any],
) -> None:
    path, network = model
    prompt, more = [3, 1, 4, 1, 5, 9] * 6, [2, 6, 5]
    options = {"tokens": 512, "max_rows": 1, "chunking": Chunking(tokens=16)}

    def at(number: int) -> Any:
        def fail(layer_idx: int) -> None:
            if layer_idx == number:
                raise ZeroDivisionError

        return fail

    def run(failing: bool, **tier: Any) -> list[torch.Tensor]:
        with open_runner(path, network.config, **options, **tier) as runner:
            row = runner.kv.rows.add(300)
            assert row is not None
            logits = [runner.forward([(row, prompt)])]
            for number in LAYERS:
                if failing:
                    with pytest.raises(ZeroDivisionError):
                        runner.forward([(row, [77] * 40)], on_layer=at(number))
                logits.append(runner.forward([(row, more)]))
            return logits

    expected = run(False)
    for tier in ({}, {"host_layers": LAYERS}):
        assert all(torch.equal(a, b) for a, b in zip(run(True, **tier), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_equals_device_bit_for_bit_on_a_gpu(
    model: tuple[Path, Any], seed: int, dtype: torch.dtype
) -> None:
    path, network = model
    options = {"device": "cuda", "dtype": dtype, "chunking": Chunking(tokens=64, group_rows=True)}
    expected = tell(path, network.config, seed, **options)
    for host_layers in (LAYERS, (1,)):
        found = tell(path, network.config, seed, host_layers=host_layers, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_growing_host_memory_is_page_locked_and_given_back(model: tuple[Path, Any]) -> None:
    path, network = model
    options = {"device": "cuda", "tokens": 1024, "host_layers": LAYERS}
    with open_runner(path, network.config, **options) as runner:
        row = runner.kv.rows.add(1024)
        assert row is not None and runner.kv.host is not None
        runner.forward([(row, [1] * 300)])
        taken = runner.kv.host.host_nbytes
        memories = [layer.memory for layer in runner.kv.host._layers.values()]
        assert all(not m.refused and m.memory[: 1 << 12].is_pinned() for m in memories)
        runner.forward([(row, [1] * 300)])
        assert runner.kv.host.host_nbytes > taken
    assert not any(memory.memory[: 1 << 12].is_pinned() for memory in memories)
