"""Drafts by another model, and by the model's own weights: fewer passes, and the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import byte_model, byte_tokenizer
from gguf_models import write_gguf
from packed_models import write_packed
from small_engine import PROMPTS, drafts_always, make_engine
from zoo import zoo_model

from layer_streamer.llm.drafts import own_weights
from layer_streamer.llm.engine import StreamingEngine

NEW = 14
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 3, "repetition_penalty": 1.2}
GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAFTS = ("same", "other", "self")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafts")
    torch.manual_seed(1)
    return {
        "target": byte_model(folder / "target", num_hidden_layers=4),
        "other": byte_model(folder / "other", num_hidden_layers=1, vocab_size=300),
    }


def open_with(paths: dict[str, Path], draft: str, **options: Any) -> StreamingEngine:
    """An engine that drafts as much as there is room for, whatever that takes."""
    chosen = {"self": "self", "same": paths["target"], "other": paths["other"]}[draft]
    return drafts_always(make_engine(paths["target"], draft=chosen, **options))


def drafter(engine: StreamingEngine) -> Any:
    """The only one."""
    assert engine.scheduler.drafting is not None
    (source,) = engine.scheduler.drafting._sources.values()
    return source


@pytest.fixture(scope="module")
def plain(paths: dict[str, Path]) -> Iterator[StreamingEngine]:
    with make_engine(paths["target"]) as engine:
        yield engine


def texts(engine: StreamingEngine, prompts: Any = PROMPTS, **options: Any) -> list[Any]:
    found: list[Any] = engine.generate(
        prompts, return_details=True, **({"max_new_tokens": NEW} | options)
    )
    return found


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert [(one.ids, one.text, one.finish_reason) for one in found] == [
        (one.ids, one.text, one.finish_reason) for one in expected
    ]


@pytest.mark.parametrize("draft", [pytest.param("same", marks=pytest.mark.slow), *DRAFTS[1:]])
def test_the_text_is_the_one_without_a_draft(
    paths: dict[str, Path], plain: StreamingEngine, draft: str
) -> None:
    with open_with(paths, draft) as engine:
        for options in (GREEDY, SAMPLED | {"stop": "a"}):
            assert_same(texts(engine, **options), texts(plain, **options))


def test_it_is_so_with_keys_and_values_in_host_memory(
    paths: dict[str, Path], plain: StreamingEngine
) -> None:
    with open_with(paths, "same", kv="host", lookup=True) as engine:
        assert_same(texts(engine, **SAMPLED), texts(plain, **SAMPLED))


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text",
        pytest.param("mistral", marks=pytest.mark.slow),
        pytest.param("qwen2-window", marks=pytest.mark.slow),
    ],
)
def test_it_is_so_where_layers_have_windows(tmp_path: Path, name: str) -> None:
    zoo_model(name).save_pretrained(tmp_path)
    with make_engine(tmp_path) as engine:
        expected = texts(engine, max_new_tokens=40, **GREEDY)
    for draft in (tmp_path, "self"):
        with make_engine(tmp_path, draft=draft, lookup=True) as engine:
            drafts_always(engine)
            assert_same(texts(engine, max_new_tokens=40, **GREEDY), expected)


def test_a_draft_by_the_same_model_is_right_to_its_end(paths: dict[str, Path]) -> None:
    with open_with(paths, "same") as engine:
        for prompt in PROMPTS:
            (done,) = texts(engine, [prompt], **GREEDY)
            assert done.passes == 2 and done.agreed == NEW - 2
            assert set(done.drafts) == {"draft"}


def test_the_next_likeliest_tokens_are_drafted_beside_those_that_follow_one_another(
    paths: dict[str, Path], plain: StreamingEngine
) -> None:
    with open_with(paths, "same") as engine:
        source = drafter(engine)
        source._steps._goes_on = lambda count, *_: count < 8
        found = source.propose(1, PROMPTS[2], 60)
        trunk = found.trunk()
        assert len(trunk) == 8 < len(found) == 32 and found.first(len(trunk)) == trunk
        likely = [0.0] * len(found)
        ids = [*PROMPTS[2], *trunk.tokens]
        row = engine._runner.kv.rows.add(len(ids))
        assert row is not None
        logits = engine._runner.forward([(row, ids)], every_position=True)[len(PROMPTS[2]) - 1 :]
        shares = logits.softmax(-1)
        for node, (token, parent) in enumerate(zip(found.tokens, found.parents, strict=True)):
            before = 1.0 if parent == -1 else likely[parent]
            likely[node] = before * float(shares[parent + 1, token])
        beside = likely[len(trunk) :]
        assert beside == sorted(beside, reverse=True)
        for node in range(8):
            follow = [t for t, p in zip(found.tokens, found.parents, strict=True) if p == node - 1]
            assert follow == shares[node].topk(len(follow)).indices.tolist()


def test_own_weights_in_eight_bits_agree_mostly(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the draft sees the keys and values of the model, at the right places: of 258 tokens it
    would agree by chance with one in 258."""
    monkeypatch.setattr(own_weights, "BITS", 8)
    monkeypatch.setattr(own_weights, "MOST", 2.0)
    with open_with(paths, "self") as engine:
        for _ in range(2):
            found = texts(engine, **GREEDY)
            assert sum(len(d.ids) for d in found) >= 3 * sum(d.passes for d in found)


def test_own_weights_of_a_gguf_file_are_in_its_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries and keys are permuted in such a file of a llama model."""
    monkeypatch.setattr(own_weights, "BITS", 8)
    monkeypatch.setattr(own_weights, "MOST", 2.0)
    path = tmp_path / "model.gguf"
    write_gguf(path, zoo_model("llama"))
    with make_engine(path) as engine:
        expected = texts(engine, **GREEDY)
    with make_engine(path, draft="self") as engine:
        drafts_always(engine)
        found = texts(engine, **GREEDY)
    assert_same(found, expected)
    assert sum(len(d.ids) for d in found) >= 3 * sum(d.passes for d in found)


def test_more_rows_than_the_draft_has_room_for_go_on_without(
    paths: dict[str, Path], plain: StreamingEngine
) -> None:
    prompts = [[i + 1] * 20 for i in range(6)]
    expected = texts(plain, prompts, **GREEDY)
    with open_with(paths, "other", kv_tokens=64, max_batch=4) as engine:
        assert_same(texts(engine, prompts, **GREEDY), expected)
        assert_same(texts(engine, prompts, **GREEDY), expected)


def test_a_conversation_is_not_taken_again_by_the_draft(paths: dict[str, Path]) -> None:
    with open_with(paths, "same") as engine:
        (first,) = texts(engine, [PROMPTS[2]], **GREEDY)
        draft = drafter(engine)
        forward, taken = draft._steps._runner.forward, 0  # type: ignore[attr-defined]

        def count(entries: Any, **options: Any) -> torch.Tensor:
            nonlocal taken
            taken += max(len(ids) for _, ids in entries) - 1
            logits: torch.Tensor = forward(entries, **options)
            return logits

        draft._steps._runner.forward = count  # type: ignore[attr-defined]
        texts(engine, [[*PROMPTS[2], *first.ids, 5, 6]], **GREEDY)
        assert taken <= 4


@pytest.mark.parametrize(
    ("draft", "where"),
    [
        ("other", 1),
        ("self", 3),
        pytest.param("other", 3, marks=pytest.mark.slow),
        pytest.param("self", 1, marks=pytest.mark.slow),
    ],
)
def test_a_draft_model_that_fails_costs_its_draft_and_not_the_row(
    paths: dict[str, Path],
    plain: StreamingEngine,
    draft: str,
    where: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = texts(plain, **GREEDY)
    with open_with(paths, draft) as engine:
        source = drafter(engine)
        forward, calls = source._steps._runner.forward, 0

        def fail(entries: Any, **options: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls % 4 == where:
                raise torch.OutOfMemoryError("no room for a draft")
            logits: torch.Tensor = forward(entries, **options)
            return logits

        source._steps._runner.forward = fail
        assert_same(texts(engine, **GREEDY), expected)
        assert "no room for a draft" in caplog.text


def test_logits_that_are_no_numbers_are_no_draft(
    paths: dict[str, Path], plain: StreamingEngine
) -> None:
    expected = texts(plain, **GREEDY)
    with open_with(paths, "same") as engine:
        source = drafter(engine)
        forward = source._steps._runner.forward
        source._steps._runner.forward = lambda entries, **o: forward(entries, **o) * float("nan")
        found = texts(engine, **GREEDY)
        assert_same(found, expected)
        assert all(done.drafted == 0 for done in found)


def test_another_vocabulary_is_refused_by_its_first_difference(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    other = byte_model(tmp_path / "other")
    tokenizer = byte_tokenizer()
    swapped = str(tokenizer.backend_tokenizer.to_str())
    order = {token: i for token, i in tokenizer.get_vocab().items() if i < 256}
    for token, i in order.items():
        swapped = swapped.replace(f'"{token}":{i},', f'"{token}":{255 - i},')
    (other / "tokenizer.json").write_text(swapped)
    with pytest.raises(ValueError, match=r"ids are other tokens than the model's \(id 1: "):
        make_engine(paths["target"], draft=other)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        make_engine(paths["target"], draft=other)


def test_a_wider_vocabulary_never_drafts_what_the_model_has_not(paths: dict[str, Path]) -> None:
    with make_engine(paths["other"], draft=paths["target"]) as engine:  # 300 wide, 258 in the draft
        drafts_always(engine)
        expected = texts(engine, **GREEDY)
    with make_engine(paths["other"]) as engine:
        assert_same(texts(engine, **GREEDY), expected)


def test_a_row_with_ids_that_the_draft_has_not_is_drafted_for_all_the_same(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[299, 7, 8, 280], [30, 258, 258, 31]]
    with make_engine(paths["other"]) as engine:  # 300 wide, 258 in the draft
        expected = texts(engine, prompts, **GREEDY)
    with make_engine(paths["other"], draft=paths["target"]) as engine:
        drafts_always(engine)
        found = texts(engine, prompts, **GREEDY)
    assert_same(found, expected)
    assert all(done.drafted for done in found) and "failed" not in caplog.text


def test_own_weights_need_keys_and_values_on_the_device(paths: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match='draft="self": not with kv="host"'):
        make_engine(paths["target"], draft="self", kv="host")


def test_a_model_of_four_bits_is_told_to_name_a_draft(tmp_path: Path) -> None:
    model = zoo_model("qwen2", hidden_size=128, intermediate_size=128)
    for packing, refused in (("ct4-g32", True), ("ct8-g32", False)):
        path = write_packed(tmp_path / packing, model, packing)
        if not refused:
            make_engine(path, draft="self").close()
            continue
        with pytest.raises(ValueError, match="name a smaller model with the same tokenizer"):
            make_engine(path, draft="self")


def test_the_plan_counts_what_drafts_and_refuses_what_does_not_fit(paths: dict[str, Path]) -> None:
    for draft in DRAFTS:
        with open_with(paths, draft, device_budget="64MiB") as engine:
            taken = engine.plan.device["draft"]
            assert taken > 0 and "draft" in str(engine.plan)
            needed = engine.plan.device_nbytes
        with make_engine(paths["target"], device_budget="64MiB") as engine:
            assert engine.plan.device["draft"] == 0
        with pytest.raises(ValueError, match="draft "):
            open_with(paths, draft, device_budget=needed - taken)
