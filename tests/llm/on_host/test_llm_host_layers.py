"""Layers of the engine that are computed in host memory: as if they had been streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint, tiny_model
from fake_device import near_device
from gguf_models import file_config, write_gguf
from interrupter import Interrupt, Interrupter
from one_sequence import Story
from zoo import zoo_model

from layer_streamer.llm.drafts.tree import Tree
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.passes.chunking import Chunking

WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1}
KINDS: dict[str, dict[str, Any]] = {"full": {}, "windows": WINDOW}
THERE = (0, 2)
MAPPED: dict[str, Any] = {"read_mode": "mapped"}
IMAGES: dict[str, Any] = {"n_gpu": 1, "n_cpu_pinned": 1}


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = tiny_model("qwen2", max_position_embeddings=2048, **KINDS[request.param])
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), model), model


@pytest.fixture(autouse=True)
def with_memory_of_its_own() -> Iterator[None]:
    with near_device():
        yield


def tell(path: Path, config: Any, seed: int, **options: Any) -> tuple[list[torch.Tensor], int]:
    """The logits of a story's passes, and how many had layers computed in host memory."""
    options = {"tokens": 3072, "max_rows": 4, "chunking": Chunking(tokens=64)} | options
    with open_runner(path, config, **options) as runner:
        found = Story(seed, 14).tell(runner)
        return found, 0 if runner.host is None else runner.host.passes


@pytest.mark.parametrize(
    ("seed", "there", "away", "options"),
    [
        (0, THERE, (), MAPPED),
        (3, THERE, (1,), IMAGES),
        pytest.param(1, (1,), (0, 1), MAPPED, marks=pytest.mark.slow),
        pytest.param(2, (0, 1, 2), (), IMAGES, marks=pytest.mark.slow),
        pytest.param(4, (0, 1, 2), (), MAPPED, marks=pytest.mark.slow),
        pytest.param(5, (1,), (), IMAGES, marks=pytest.mark.slow),
    ],
)
def test_passes_by_turns_here_and_there_give_the_logits_of_streamed_ones(
    model: tuple[Path, Any], seed: int, there: Any, away: Any, options: dict[str, Any]
) -> None:
    path, network = model
    expected, none = tell(path, network.config, seed)
    found, passes = tell(path, network.config, seed, computed=there, host_layers=away, **options)
    assert none == 0 < passes < len(found)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= 1e-5


def test_several_numbers_of_threads_are_tried_and_torch_has_its_own_again(
    model: tuple[Path, Any],
) -> None:
    path, network = model
    before = torch.get_num_threads()
    with open_runner(path, network.config, tokens=64, max_rows=1, computed=THERE) as runner:
        host, row = runner.host, runner.kv.rows.add(64)
        assert host is not None
        host.threads, tried = 4, set()
        try:
            for token in range(40):
                runner.forward([(row, [7 + token])])
                assert torch.get_num_threads() == 4
                assert host._last is not None
                tried.add(host._last[1])
        finally:
            torch.set_num_threads(before)
        assert {4, 3, 2} <= tried
        assert not host.crews[1].tries


PROMPTS = [[7, 8, 9] * 6, [20, 21], [30] * 12]


@pytest.mark.parametrize(
    "options",
    [{"lookup": True}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"kv": "host"}))],
)
def test_an_engine_says_the_same_with_layers_in_host_memory(
    model: tuple[Path, Any], options: dict[str, Any]
) -> None:
    path, _ = model
    asked = {"max_new_tokens": 24, "temperature": 0.0, "return_details": True}
    given: dict[str, Any] = {"device": "cpu", "max_length": 64, "kv_tokens": 512}
    with StreamingEngine(path, **given) as engine:
        expected = [list(c.ids) for c in engine.generate(PROMPTS, **asked)]
    with StreamingEngine(path, host_layers=2, **given, **options) as engine:
        assert engine.streamer.plan.host_layers == (0, 2)
        assert set(engine.plan.host_layers) >= {0, 2}
        found = [list(c.ids) for c in engine.generate(PROMPTS, **asked)]
        host = engine._runner.host
        assert host is not None and host.passes > 0
    assert found == expected


@pytest.mark.slow
def test_in_bfloat16_they_are_no_further_off_than_streamed_ones(model: tuple[Path, Any]) -> None:
    path, network = model
    exact, _ = tell(path, network.config, 5)
    rounded, there = (
        tell(path, network.config, 5, dtype=torch.bfloat16, computed=computed)[0]
        for computed in ((), THERE)
    )
    far, near = (
        max(relative_error(a.float(), b) for a, b in zip(some, exact, strict=True))
        for some in (rounded, there)
    )
    assert near <= 1.5 * far


@pytest.mark.parametrize(
    "options", [{"reproducible": True}, {"kv_int8": True, "kv": "host"}, {"draft": "self"}]
)
def test_what_does_not_go_with_layers_in_host_memory_is_refused(
    model: tuple[Path, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*does not go with host_layers"):
        StreamingEngine(model[0], device="cpu", max_length=64, host_layers=1, **options)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_layers_are_multiplied_as_they_lie(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, zoo_model(name))
    found = []
    for computed in ((), (0, 1)):
        with open_runner(path, file_config(path), computed=computed) as runner:
            row = runner.kv.rows.add(60)
            assert row is not None
            found.append(
                torch.cat([runner.forward([(row, ids)]) for ids in ([5] * 20, [6], [7, 8])])
            )
            assert (runner.host is not None and runner.host.passes == 2) == bool(computed)
    assert relative_error(found[1], found[0]) <= 1e-5


def test_a_pass_that_fails_in_a_layer_of_the_host_leaves_the_rows_as_they_were(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = model
    ids = [[5, 6, 7] * 9, [8], [9], [10, 11]]
    with open_runner(path, network.config) as runner:
        row = runner.kv.rows.add(60)
        expected = [runner.forward([(row, some)]) for some in ids if row is not None]
    with open_runner(path, network.config, computed=THERE) as runner:
        row = runner.kv.rows.add(60)
        assert row is not None
        found = []
        for some in ids:
            for layer_idx in THERE if len(some) == 1 else ():
                fails_in(layer_idx, monkeypatch)
                with pytest.raises(MemoryError, match="no room"):
                    runner.forward([(row, some)])
                monkeypatch.undo()
            found.append(runner.forward([(row, some)]))
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= 1e-5


def fails_in(layer_idx: int, patch: pytest.MonkeyPatch) -> None:
    """Have a layer that is computed in host memory raise once its keys are stored."""
    close = KVCache.close_home

    def closes(kv: KVCache, index: int) -> None:
        close(kv, index)
        if index == layer_idx:
            raise MemoryError("no room")

    patch.setattr(KVCache, "close_home", closes)


def test_a_draft_that_is_a_tree_is_looked_at_where_layers_lie(model: tuple[Path, Any]) -> None:
    path, network = model
    tree, found = Tree((1, 2, 3, 4), (-1, -1, 0, 2)), []
    for computed in ((), THERE):
        with open_runner(
            path, network.config, computed=computed, max_rows=2, tokens=1024
        ) as runner:
            rows = [runner.kv.rows.add(200) for _ in range(2)]
            entries = [(row, [5 + i] * (30 + i)) for i, row in enumerate(rows) if row is not None]
            logits = [runner.forward(entries)]
            drafted = [(row, [9, *tree.tokens]) for row, _ in entries[:1]] + [(entries[1][0], [8])]
            logits.append(runner.forward(drafted, drafts=[tree, Tree()]))
            found.append(torch.cat(logits))
            assert runner.host is None or runner.host.passes == 1
    assert relative_error(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("stride", [67, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupt_at_a_line_of_a_pass_of_the_host_leaves_the_rows_as_they_were(
    model: tuple[Path, Any], stride: int
) -> None:
    path, network, threads = *model, torch.get_num_threads()
    prompt, found, number, fired = [5, 6, 7] * 9, list[torch.Tensor](), 0, True
    with open_runner(path, network.config) as runner:
        row = runner.kv.rows.add(60)
        assert row is not None
        expected = [runner.forward([(row, ids)]) for ids in (prompt, [8])][1]
    with open_runner(path, network.config, computed=THERE) as runner:
        row = runner.kv.rows.add(60)
        assert row is not None
        runner.forward([(row, prompt)])
        while fired:
            with suppress(Interrupt), Interrupter(number, "line") as interrupter:
                runner.forward([(row, [8])])
            runner.kv.rows.truncate(row, len(prompt))
            found.append(runner.forward([(row, [8])]))
            runner.kv.rows.truncate(row, len(prompt))
            number, fired = number + stride, interrupter.fired
        assert torch.get_num_threads() == threads
    assert len(found) > 10
    assert max(relative_error(logits, expected) for logits in found) <= 1e-5
