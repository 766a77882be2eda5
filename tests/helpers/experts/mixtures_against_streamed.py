"""Captured passes over mixtures whose experts come on demand, against launched ones: run by
test_llm_slot_products.py, in Triton's interpreter or on a GPU, as decode_against_streamed.py is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import relative_error
from decode_against_streamed import FEW, opened, passes
from gpt_oss_models import write_blocks
from packed_models import write_packed
from triton_runs import INTERPRETED_HERE
from zoo import IDS, MIXTURES, zoo_model

from layer_streamer.llm.kernels import slot_products, slot_tiles
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models import mixing
from layer_streamer.llm.passes.runner import Runner

SLOTS = {"all": 10_000, "some": 14, "few": 5}
"""Of all layers. Five hold what a token passes, but not always what two do."""
ROUNDED = 2e-2
"""What logits in float16 may differ by, where an expert that is as good as another may be chosen in
its place."""
PROMPTS, STEPS = ((2, 5), 2) if INTERPRETED_HERE else ((23, 50), 4)
EVERY = [(name, slots) for name in MIXTURES for slots in SLOTS]
if INTERPRETED_HERE:  # where each takes minutes: each type, with one number of slots or another
    EVERY = [(name, list(SLOTS)[i % len(SLOTS)]) for i, name in enumerate(MIXTURES)]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Programs, or pairs, of each product of experts in slots that was launched."""
    found, multiply, launch = list[int](), slot_tiles.multiply, slot_products.launch_slots

    def heed(bank: Any, x: Any, routed: slot_tiles.Routed, out: Any, **named: Any) -> None:
        found.append(len(routed.tiles_N3))
        multiply(bank, x, routed, out, **named)

    def heed_pairs(banks: Any, x: Any, slots_P: torch.Tensor, per_x: int = 1) -> torch.Tensor:
        found.append(len(slots_P))
        return launch(banks, x, slots_P, per_x)

    monkeypatch.setattr(slot_tiles, "multiply", heed)
    monkeypatch.setattr(slot_products, "launch_slots", heed_pairs)
    yield found


def run(
    path: Path,
    rows: int,
    look: Callable[[Runner], Any] = passes,
    steps: int = STEPS,
    **options: Any,
) -> Any:
    """Logits of prompts, then of some tokens of each row, captured unless ``rows`` is 0, and what
    ``look`` says at the end."""
    given = {"experts": "demand", "device_budget": "1GiB", "dtype": torch.float16}
    with opened(path, load_config(path), rows=rows, **given | options) as runner:
        prompts = [IDS[k : k + n] for k, n in enumerate(PROMPTS)]
        places = [runner.kv.rows.add(len(ids) + steps) for ids in prompts]
        found = [runner.forward(list(zip(places, prompts, strict=True)))]
        for i in range(steps):
            found.append(runner.forward([(row, [IDS[i + k]]) for k, row in enumerate(places)]))
        return torch.cat(found).float().cpu(), look(runner)


def packed_checkpoint(tmp_path: Path, name: str) -> Path:
    """A mixture in words of four bits, or as it is published."""
    model = zoo_model(name)
    if name == "gpt_oss":
        return write_blocks(tmp_path / "packed", model.to(torch.bfloat16))
    write_packed(tmp_path / "packed", model, "ct4-g32")
    return tmp_path / "packed"


@pytest.mark.parametrize(("name", "slots"), [("qwen2_moe-dense", "some")] if FEW else EVERY)
def test_captured_mixtures_give_the_logits_of_launched_ones(
    tmp_path: Path, name: str, slots: str, launched: list[int]
) -> None:
    path = packed_checkpoint(tmp_path, name)
    expected, none = run(path, 0, expert_slots=SLOTS[slots])
    found, (captured, whole) = run(
        path, 2, lambda runner: (passes(runner), runner.captures_passes), expert_slots=SLOTS[slots]
    )
    experts = load_config(path).experts
    assert experts is not None
    assert (none, captured, whole) == (0, STEPS, SLOTS[slots] >= experts.total)
    assert launched and relative_error(found, expected) <= ROUNDED


@pytest.mark.parametrize(("name", "slots"), [("qwen3_moe", "all")] if FEW else EVERY)
def test_prompts_that_pass_nearly_all_experts_give_the_logits_of_whole_layers(
    tmp_path: Path, name: str, slots: str, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, routed = packed_checkpoint(tmp_path, name), list[int]()
    route_all = slot_tiles.route_all

    def heed(ids_TK: torch.Tensor, slots_X: torch.Tensor) -> slot_tiles.Routed:
        routed.append(len(slots_X))
        return route_all(ids_TK, slots_X)

    monkeypatch.setattr(slot_tiles, "route_all", heed)
    monkeypatch.setattr(mixing, "FEW", 0)
    monkeypatch.setattr(mixing, "CROWD", 1)
    experts = load_config(path).experts
    assert experts is not None
    expected, _ = run(path, 0, steps=0, experts="whole")
    found, _ = run(path, 0, steps=0, expert_slots=SLOTS[slots])
    assert relative_error(found, expected) <= ROUNDED
    at_once = SLOTS[slots] >= min(2 * experts.count, experts.total)
    assert bool(routed) == at_once and set(routed) <= {experts.count}
