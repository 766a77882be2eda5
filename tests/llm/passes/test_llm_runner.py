"""Every architecture, in ragged batches, on every tier and with any chunk, against transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint
from torch.nn.attention.bias import causal_upper_left
from zoo import CASES, CLASSES, DENSE, IDS, in_doubles, reference, zoo_model

from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.passes import row_attention
from layer_streamer.llm.passes.attention import window_mask
from layer_streamer.llm.passes.batch import pack
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner

TOLERANCE, STEPS = 1e-5, 16
LENGTHS = (50, 23, 1)
"""Of the prompts of a ragged batch; each row goes on for STEPS more tokens."""
ROUTES: dict[str, dict[str, Any]] = {
    "device": {},
    "host": {"host_layers": (0, 1, 2), "chunking": Chunking(tokens=7)},
    "some on the host": {"host_layers": (1,), "chunking": Chunking(tokens=64, group_rows=True)},
    "one by one": {"chunking": Chunking(tokens=1)},
}
DEFAULT = list(zip(CASES, [*ROUTES] * len(CASES), strict=False))
"""Each case on one route; all of them are slow."""
ALL = [(case, route) for case in CASES for route in ROUTES if (case, route) not in DEFAULT]


def texts(count: int) -> list[list[int]]:
    """Texts of a ragged batch: the prompts, and what is fed token by token."""
    return [IDS[5 * i :][: LENGTHS[i] + STEPS] for i in range(count)]


def teacher_forced(runner: Runner, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits after every token of every row, all rows in each pass."""
    slots = [runner.kv.rows.add(len(ids)) for ids in rows]
    found: list[list[torch.Tensor]] = [[] for _ in rows]

    def feed(parts: list[list[int]]) -> None:
        entries = [(row, part) for row, part in zip(slots, parts, strict=True) if row is not None]
        logits = runner.forward(entries, every_position=True)
        for into, piece in zip(found, logits.split([len(p) for p in parts]), strict=True):
            into.append(piece)

    prompts = [len(ids) - STEPS for ids in rows]
    feed([ids[:n] for ids, n in zip(rows, prompts, strict=True)])
    for step in range(STEPS):
        feed([[ids[n + step]] for ids, n in zip(rows, prompts, strict=True)])
    return [torch.cat(pieces).cpu() for pieces in found]


def errors(path: Path, model: Any, route: str, **options: Any) -> list[float]:
    rows = texts(len(LENGTHS))
    with open_runner(
        path, load_config(path), tokens=1024, max_rows=3, **ROUTES[route], **options
    ) as runner:
        found = teacher_forced(runner, rows)
    expected = [reference(model, ids, n) for ids, n in zip(rows, LENGTHS, strict=True)]
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("name", "route"), [*DEFAULT, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL)]
)
def test_a_ragged_batch_gives_the_logits_of_transformers_row_by_row(tmp_path, name, route):
    model = zoo_model(name)
    assert max(errors(tiny_checkpoint(tmp_path, model), model, route)) <= TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("route", ["device", "host"])
def test_a_prompt_many_times_as_long_as_the_windows_ring_is_that_of_transformers(
    tmp_path, name, route
):
    model = zoo_model(name, max_position_embeddings=2048)
    path = tiny_checkpoint(tmp_path, model)
    ids = (IDS * 20)[:1300]
    options = ROUTES[route] | {"chunking": Chunking(tokens=300)}
    with open_runner(path, load_config(path), tokens=1536, **options) as runner:
        row = runner.kv.rows.add(1400)
        assert row is not None
        found = [runner.forward([(row, ids[:1200])], every_position=True)]
        found += [runner.forward([(row, [token])]) for token in ids[1200:1230]]
        assert runner.kv.rows.truncate(row, 1100) == 1100
        found.append(runner.forward([(row, ids[1100:])], every_position=True))
    expected = reference(model, ids, 1200)
    expected = torch.cat((expected[:1230], expected[1100:]))
    assert relative_error(torch.cat(found), expected) <= TOLERANCE


@pytest.mark.parametrize("limit", [1, 3000, 20000])
def test_rows_that_decode_together_are_gathered_a_few_at_a_time(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(row_attention, "GATHER_NBYTES", limit)
    model = zoo_model("gemma3_text")
    assert max(errors(tiny_checkpoint(tmp_path, model), model, "some on the host")) <= TOLERANCE


def shifted(change: int) -> Any:
    """``pack``, with positions that are off."""

    def wrong(*arguments: Any) -> Any:
        batch = pack(*arguments)
        chunks = tuple(replace(c, positions=c.positions + change * c.first) for c in batch.chunks)
        return replace(batch, chunks=chunks)

    return wrong


PASSES = "layer_streamer.llm.passes"
MUTATIONS = {
    "a mask that starts at the first position": (
        "llama", "torch.nn.attention.bias.causal_lower_right", causal_upper_left
    ),
    "positions that go on from chunk to chunk": ("llama", f"{PASSES}.runner.pack", shifted(1)),
    "new tokens that stay away from home": (
        "llama", "layer_streamer.llm.kv.host.HostTier.close_layer", lambda *_: None
    ),
    "a mask of a window that is one off": (
        "mistral", f"{PASSES}.attention.window_mask",
        lambda t, p, w, d: window_mask(t, p, w + 1, d)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_is_wrong_shows(tmp_path, monkeypatch, what):
    name, target, wrong = MUTATIONS[what]
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path, model)
    monkeypatch.setattr(target, wrong)
    assert max(errors(path, model, "host")) > 100 * TOLERANCE


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "gemma3_text"])
def test_a_window_that_is_one_off_shows(tmp_path, name, off):
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path, model)
    config = load_config(path)
    windows = tuple(w if w is None else w + off for w in config.windows)
    ids = texts(1)
    with open_runner(path, replace(config, windows=windows), tokens=256) as runner:
        (found,) = teacher_forced(runner, ids)
    assert relative_error(found, reference(model, ids[0], LENGTHS[0])) > 100 * TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_logits_of_transformers_row_by_row(tmp_path, name, route):
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path, model)
    assert max(errors(path, in_doubles(model), route, device="cuda")) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_bfloat16_with_tiers_is_as_near_to_float32_as_that_of_transformers(tmp_path, name):
    path = tiny_checkpoint(tmp_path, zoo_model(name).to(torch.bfloat16))
    load = CLASSES[name.partition("-")[0]][1].from_pretrained
    theirs, exact = (
        reference(load(path, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    with open_runner(
        path, load_config(path), tokens=256, dtype=torch.bfloat16, **ROUTES["host"]
    ) as runner:
        (ours,) = teacher_forced(runner, [IDS])
    ours, theirs = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert ours <= 1.25 * theirs
