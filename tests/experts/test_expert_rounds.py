"""All experts of a layer, or many: half of the slots are computed with, half are filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import DEVICES, EXPERTS, LAYERS, Experts, alone, opened, same_bytes, stacked
from support import open_checkpoint

from layer_streamer import LayerStreamer, ReadError


def check_rounds(streamer: LayerStreamer, expected: Experts, asked: list[int] | None) -> None:
    """One pass that goes through rounds of some experts (None: all), and compares their bytes."""
    device: Any = streamer._devices[0]
    for layer_idx, weights in streamer.sweep():
        experts: Any = weights.experts  # type: ignore[attr-defined]
        seen = list[int]()
        for part, slots in experts.whole() if asked is None else experts.rounds(asked):
            if isinstance(device, FakeDevice):
                device.drain()
            assert slots.tolist() == [experts.where[expert] for expert in part]
            for expert, slot in zip(part, slots.tolist(), strict=True):
                for name in experts.names:
                    bank = experts.bank(name)[slot]
                    assert same_bytes(bank, expected[layer_idx, expert, name])
            seen += part
        assert seen == sorted(set(range(EXPERTS) if asked is None else asked))


@settings(max_examples=8)
@given(
    slots=st.integers(1, 25),
    passes=st.lists(
        st.none() | st.lists(st.integers(0, EXPERTS - 1), max_size=9), min_size=1, max_size=4
    ),
)
@pytest.mark.parametrize("kind", DEVICES)
def test_rounds_hand_out_each_expert_once_in_order_with_its_own_bytes(
    tmp_path_factory: pytest.TempPathFactory, kind: str, slots: int, passes: list[list[int] | None]
) -> None:
    path = tmp_path_factory.mktemp("rounds")
    expected = alone(path)
    with opened(path, kind, slots) as streamer:
        for asked in passes:
            check_rounds(streamer, expected, asked)


@pytest.mark.parametrize("maps", [True, False])
def test_the_next_round_is_on_its_way_before_the_present_one_is_given_up(
    tmp_path: Path, maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(tmp_path)
    device = FakeDevice(0, eager=0.0)
    device.maps_files = maps  # type: ignore[misc]
    options: dict[str, Any] = {"experts": "demand", "expert_slots": 4, "read_threads": 2}
    with open_checkpoint(device, tmp_path, **options) as streamer:
        store: Any = streamer._opened().experts
        told = list[Any]()
        bring, follow_use = store._home.bring, store.copies.follow_use

        def note_brought(wanted: Any, *rest: Any) -> None:
            told.append([one.expert for one in wanted])
            bring(wanted, *rest)

        def note_given_up() -> None:
            told.append("given up")
            follow_use()

        monkeypatch.setattr(store._home, "bring", note_brought)
        monkeypatch.setattr(store.copies, "follow_use", note_given_up)
        for layer_idx, weights in streamer.sweep():
            experts: Any = weights.experts  # type: ignore[attr-defined]
            for part, _ in experts.whole() if layer_idx == 0 else ():
                told.append(tuple(part))
    over = "given up"
    assert told == [
        [0, 1], [2, 3], (0, 1), over, [4, 5], (2, 3), over, [6], (4, 5), over, (6,), over,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", DEVICES)
def test_what_was_brought_ahead_counts_as_missed_and_once(tmp_path: Path, kind: str) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, kind, 4) as streamer:
        check_rounds(streamer, expected, None)
        found = streamer.last_experts
        assert found is not None and (found.asked, found.hits, found.hinted) == (21, 0, 0)
        assert found.copied_bytes == sum(tensor.nbytes for tensor in expected.values())
        assert found.needed == tuple((i, tuple(range(EXPERTS))) for i in range(LAYERS))


@pytest.mark.parametrize("kind", DEVICES)
def test_a_loop_over_rounds_that_is_left_leaves_nothing_wrong(tmp_path: Path, kind: str) -> None:
    expected = stacked(tmp_path)
    with opened(tmp_path, kind, 4) as streamer:
        for left_at in range(3):

            def step(x: Any, weights: Any, layer_idx: int, left_at: int = left_at) -> None:
                for number, _ in enumerate(weights.experts.whole()):
                    if number == left_at:
                        break
                weights.experts.hint([6, 5], layer=layer_idx)

            streamer.run_pass(0, step)
            check_rounds(streamer, expected, [0, 3, 4, 5, 6])


@pytest.mark.parametrize("kind", ["cpu", "read"])
def test_an_error_in_what_is_read_ahead_is_raised_by_its_own_round(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stacked(tmp_path)
    with opened(tmp_path, kind, 4) as streamer:
        files = streamer._opened().pipeline.files
        whole = streamer.manifest.tensor("model.layers.0.mlp.experts.down_proj")
        nbytes = whole.nbytes // EXPERTS
        usual, seen = type(files).read_into, list[int]()

        def fail(self: Any, path: Path, view: Any, offset: int, *rest: Any) -> None:
            if whole.offset + 5 * nbytes <= offset < whole.offset + 6 * nbytes:
                raise ReadError(f"{path}: no")
            usual(self, path, view, offset, *rest)

        def step(x: Any, weights: Any, layer_idx: int) -> None:
            for part, _ in weights.experts.whole():
                seen.extend(part)

        with monkeypatch.context() as patched:
            patched.setattr(type(files), "read_into", fail)
            with pytest.raises(ReadError, match=r"^layer 0, expert 5: tensor "):
                streamer.run_pass(0, step)
        assert seen == [0, 1, 2, 3]
        check_rounds(streamer, expected, None)


def test_a_gradient_through_a_round_that_was_overwritten_is_an_error(tmp_path: Path) -> None:
    alone(tmp_path)
    x, name = torch.ones(1, 11, dtype=torch.float16, requires_grad=True), "mlp.experts.down.weight"
    with opened(tmp_path, slots=4) as streamer:
        sums = []
        for layer_idx, weights in streamer.sweep():
            experts: Any = weights.experts  # type: ignore[attr-defined]
            for _, slots in experts.whole() if layer_idx == 0 else ():
                sums.append((x @ experts.bank(name)[int(slots[0])].t()).sum())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sums[0].backward()
