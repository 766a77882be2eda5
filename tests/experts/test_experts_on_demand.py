"""Experts that are brought on demand: exact, bounded, loud."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensor, tiny_checkpoint, write_safetensors
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import (
    DEVICES,
    EXPERTS,
    LAYERS,
    LAYOUTS,
    alone,
    check,
    opened,
    same_bytes,
    stacked,
)
from support import open_checkpoint

from layer_streamer import (
    CheckpointChangedError,
    CheckpointError,
    ConfigError,
    LayerStreamer,
    ReadError,
    StreamerError,
    plan_checkpoint,
)
from layer_streamer.devices.device import CpuDevice
from layer_streamer.experts.hits import count_hits
from layer_streamer.experts.policies import make_policy
from layer_streamer.passes.expert_report import ExpertReport
from layer_streamer.passes.expert_store import ExpertStore

asked_of_layers = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), max_size=2 * EXPERTS), min_size=LAYERS, max_size=LAYERS
)


@settings(max_examples=6)
@given(passes=st.lists(asked_of_layers, min_size=1, max_size=4), slots=st.integers(1, 30))
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_slot_holds_the_files_bytes_of_its_expert(
    tmp_path_factory: pytest.TempPathFactory, layout: str, kind: str,
    passes: list[list[list[int]]], slots: int,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("mixture")
    expected = LAYOUTS[layout](path)
    with opened(path, kind, slots) as streamer:
        for asked in passes:
            check(streamer, expected, asked)


def test_layers_hand_out_what_is_no_experts_as_ever(tmp_path: Path) -> None:
    alone(tmp_path)
    with opened(tmp_path) as some, open_checkpoint(CpuDevice(), tmp_path) as whole:
        for (_, few), (_, all_of_it) in zip(some.sweep(), whole.sweep(), strict=True):
            assert set(few) == {key for key in all_of_it if "experts" not in key}
            assert all(same_bytes(few[key], all_of_it[key]) for key in few)
        assert some.manifest.layers == whole.manifest.layers


@pytest.mark.parametrize("kind", DEVICES)
def test_what_is_there_is_not_brought_again(tmp_path: Path, kind: str) -> None:
    expected = alone(tmp_path)
    asked, needed = [[4, 1, 1], [0, 5], []], ((0, (1, 4)), (1, (0, 5)))
    with opened(tmp_path, kind, LAYERS * EXPERTS) as streamer:
        check(streamer, expected, asked)
        nbytes = sum(t.nbytes for (i, e, _), t in expected.items() if e in asked[i])
        assert streamer.last_experts == ExpertReport(4, 0, nbytes, needed=needed)
        check(streamer, expected, asked)
        assert streamer.last_experts == ExpertReport(4, 4, 0, needed=needed)


def test_a_report_says_what_each_layer_needed_in_rounds_or_at_once(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    for slots in (2, 100):
        with opened(tmp_path, slots=slots) as streamer:
            check(streamer, expected, [[5, 1, 3, 1, 0], [], [6]])
            assert streamer.last_experts is not None
            assert streamer.last_experts.needed == ((0, (0, 1, 3, 5)), (2, (6,)))
        assert streamer.last_experts.needed == ((0, (0, 1, 3, 5)), (2, (6,))), "after closing, too"


def test_hits_are_those_that_the_simulator_counts(tmp_path: Path) -> None:
    expected, dice = alone(tmp_path), random.Random(4)
    for slots in (2, 5, 9):
        asked_of = [[dice.choices(range(EXPERTS), k=3) for _ in range(LAYERS)] for _ in range(30)]
        steps = [[(i, e) for e in sorted({*asked[i]})] for asked in asked_of for i in range(LAYERS)]
        hits = 0
        with opened(tmp_path, slots=slots) as streamer:
            for asked in asked_of:
                check(streamer, expected, asked)
                assert streamer.last_experts is not None
                hits += streamer.last_experts.hits
        assert hits == count_hits(steps, slots, make_policy("segmented", slots, 1))


@pytest.mark.parametrize("kind", DEVICES)
def test_what_was_hinted_at_is_there_when_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, kind, LAYERS * EXPERTS) as streamer:

        def step(x: Any, weights: Any, layer_idx: int) -> None:
            weights.experts.load([1, 2])
            if layer_idx == 0:
                assert weights.experts.hint(torch.tensor([4, 4, 1]), layer=1) == 2
                assert weights.experts.hint([1], layer=1) == 0, "it is there"

        streamer.run_pass(0, step)
        found = streamer.last_experts
        assert found is not None and (found.hinted, found.hints_used, found.hits) == (2, 1, 1)
        check(streamer, expected, [[1], [1, 2, 4], [0]])
        found = streamer.last_experts
        assert found is not None and (found.hints_used, found.hits) == (1, 4)


def test_a_hint_takes_no_slot_that_is_in_use_and_no_more_than_half_of_the_others(
    tmp_path: Path,
) -> None:
    alone(tmp_path)
    found: list[int] = []
    with opened(tmp_path, "mapped", 6) as streamer:

        def step(x: Any, weights: Any, layer_idx: int) -> None:
            weights.experts.load([0, 1, 2, 3])
            found.append(weights.experts.hint([4, 5, 6], layer=layer_idx))
            with pytest.raises(ConfigError, match="layer=7: has no experts"):
                weights.experts.hint([1], layer=7)

        streamer.run_pass(0, step)
    assert found == [1, 1, 1]


def test_more_experts_than_slots_are_refused_with_what_helps(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, slots=2) as streamer:
        with pytest.raises(ConfigError, match=r"layer 0: 3 experts at once, 2 slots.*in parts"):
            streamer.run_pass(0, lambda x, w, i: w.experts.load([1, 2, 3]))
        check(streamer, expected, [[1, 2, 3]] * LAYERS)


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_that_there_is_not_is_refused(tmp_path: Path, expert: int) -> None:
    alone(tmp_path)
    with (
        opened(tmp_path) as streamer,
        pytest.raises(ConfigError, match=f"layer 0: expert {expert}: must be from 0 to 6"),
    ):
        streamer.run_pass(0, lambda x, w, i: w.experts.load([0, expert]))


def test_a_bank_that_there_is_not_is_refused_with_those_there_are(tmp_path: Path) -> None:
    stacked(tmp_path)
    with opened(tmp_path) as streamer, pytest.raises(KeyError, match=r"experts have.*up_proj"):
        streamer.run_pass(0, lambda x, w, i: w.experts.bank("mlp.experts.gate"))


def test_what_is_kept_beyond_its_layer_loads_nothing(tmp_path: Path) -> None:
    alone(tmp_path)
    kept: list[Any] = []
    with opened(tmp_path) as streamer:
        streamer.run_pass(0, lambda x, w, i: kept.append(w.experts))
        with pytest.raises(StreamerError, match="its hand-out has ended"):
            kept[0].load([1])


def test_experts_are_handed_out_as_stored_whatever_the_rest_is_cast_to(tmp_path: Path) -> None:
    expected = stacked(tmp_path)
    with opened(tmp_path, dtype=torch.bfloat16) as streamer:
        check(streamer, expected, [[1, 2]] * LAYERS)
        found = {t.dtype for _, weights in streamer.sweep() for t in weights.values()}
    assert found == {torch.bfloat16}


def test_a_layer_without_experts_says_so(tmp_path: Path) -> None:
    LAYOUTS["unlike"](tmp_path)
    with opened(tmp_path) as streamer:
        found = [weights.experts is None for _, weights in streamer.sweep()]  # type: ignore
    assert found == [False, False, True]


@pytest.mark.parametrize("kind", DEVICES)
def test_a_write_to_a_bank_is_an_error_and_what_follows_is_exact(tmp_path: Path, kind: str) -> None:
    expected = alone(tmp_path)
    name = "mlp.experts.down.weight"
    with opened(tmp_path, kind, LAYERS * EXPERTS) as streamer:

        def write(x: Any, weights: Any, layer_idx: int) -> None:
            weights.experts.load([2])
            weights.experts.bank(name).zero_()

        with pytest.raises(StreamerError, match="experts' weights were written to"):
            streamer.run_pass(0, write)
        for _ in range(2):
            check(streamer, expected, [[2, 3]] * LAYERS)


def test_a_gradient_through_a_slot_that_was_filled_again_is_an_error(tmp_path: Path) -> None:
    alone(tmp_path)
    x, name = torch.ones(1, 11, dtype=torch.float16, requires_grad=True), "mlp.experts.down.weight"
    with opened(tmp_path, slots=1) as streamer:
        sums = []
        for _, weights in streamer.sweep():
            experts: Any = weights.experts  # type: ignore[attr-defined]
            slot = int(experts.load([3])[0])
            sums.append((x @ experts.bank(name)[slot].t()).sum())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sums[0].backward()


@pytest.mark.parametrize("kind", ["cpu", "read"])
def test_a_read_that_fails_names_layer_and_expert_and_the_next_pass_is_exact(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stacked(tmp_path)
    with opened(tmp_path, kind, LAYERS * EXPERTS) as streamer:
        files = streamer._opened().pipeline.files
        check(streamer, expected, [[0]] * LAYERS)

        whole = streamer.manifest.tensor("model.layers.0.mlp.experts.down_proj")
        usual = type(files).read_into

        def fail(self: Any, path: Path, view: Any, offset: int, *rest: Any) -> None:
            if whole.offset < offset < whole.offset + whole.nbytes:
                raise ReadError(f"{path}: no")
            usual(self, path, view, offset, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(type(files), "read_into", fail)
            with pytest.raises(
                ReadError, match=r"^layer 0, expert 4: tensor '[^ ]*down_proj': .*no$"
            ):
                streamer.run_pass(0, lambda x, w, i: w.experts.load([0, 4]))
        check(streamer, expected, [[0, 4]] * LAYERS)


def test_a_file_that_is_cut_off_in_an_expert_is_an_error(tmp_path: Path) -> None:
    stacked(tmp_path)
    file = tmp_path / "model.safetensors"
    with opened(tmp_path) as streamer:
        with open(file, "r+b") as opened_file:
            opened_file.truncate(file.stat().st_size - 100)
        with pytest.raises(CheckpointChangedError, match=r"model\.safetensors"):
            streamer.run_pass(0, lambda x, w, i: w.experts.load([6]))


def test_a_checkpoint_that_lacks_an_expert_is_refused_at_opening(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up.weight" for e in (0, 1, 3)]
    write_safetensors(tmp_path / "model.safetensors", {n: random_tensor((2, 3)) for n in names})
    with pytest.raises(CheckpointError, match=r"layer 0.*expert 2 lacks"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("where", ["bring", "place", "follow_use", "order_after_copies"])
def test_after_an_interrupt_in_a_load_everything_is_exact(
    tmp_path: Path, where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, kind, 5) as streamer:
        store = streamer._opened().experts
        assert store is not None
        owner: Any = {"bring": store._home, "place": store.pools[0]}.get(where, store.copies)
        check(streamer, expected, [[0, 1, 2]] * LAYERS)
        usual = getattr(owner, where)
        for after in (False, True):

            def interrupted(*given: Any, after: bool = after) -> None:
                if after:
                    usual(*given)
                raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(owner, where, interrupted, raising=False)
                with pytest.raises(KeyboardInterrupt):
                    check(streamer, expected, [[3, 4, 5]] * LAYERS)
            for _ in range(2):
                check(streamer, expected, [[3, 4, 5], [0, 5], [1, 4]])


def test_closing_in_the_middle_of_a_layer_returns_everything(tmp_path: Path) -> None:
    alone(tmp_path)
    device = FakeDevice(2, eager=0.0)
    options = {"experts": "demand", "expert_slots": 3, "read_threads": 2}
    streamer = open_checkpoint(device, tmp_path, **options)
    for _, weights in streamer.sweep():
        weights.experts.load([1, 2])  # type: ignore[attr-defined]
        break
    streamer.close()
    assert not device.errors and not device._pinned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_slots": None}, "expert_slots= or device_budget= has to say"),
        ({"device_budget": 2000}, "3 slots of experts take"),
        ({"experts": "whole"}, "goes with experts='demand'"),
        ({"experts": "some"}, "must be one of whole, demand"),
        ({"expert_slots": 0}, "must be from 1"),
        ({"device": ["cpu", "cpu"]}, "several devices"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_opened(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    alone(tmp_path)
    given = {"experts": "demand", "expert_slots": 3, "device": "cpu"} | options
    for door in (LayerStreamer.from_checkpoint, plan_checkpoint):
        with pytest.raises(ConfigError, match=message):
            door(tmp_path, **given)


def test_a_model_without_experts_is_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 2)
    with pytest.raises(ConfigError, match="no experts"):
        opened(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots", [1, 3, LAYERS * EXPERTS])
def test_on_a_gpu_each_slot_holds_its_experts_bytes(
    tmp_path: Path, layout: str, slots: int
) -> None:
    expected, dice = LAYOUTS[layout](tmp_path), random.Random(slots)
    options: dict[str, Any] = {"experts": "demand", "expert_slots": slots}
    with LayerStreamer.from_checkpoint(tmp_path, device="cuda", **options) as streamer:
        assert isinstance(streamer._opened().experts, ExpertStore)
        for _ in range(30):
            asked = [dice.choices(range(EXPERTS), k=dice.randint(0, 9)) for _ in range(LAYERS)]
            for layer_idx, weights in streamer.sweep():
                experts: Any = weights.experts  # type: ignore[attr-defined]
                for part in [] if experts is None else experts.parts(asked[layer_idx]):
                    found = experts.load(torch.tensor(part, device="cuda"))
                    for expert, slot in zip(part, found.tolist(), strict=True):
                        for name in experts.names:
                            bank = experts.bank(name)[slot].cpu()
                            assert same_bytes(bank, expected[layer_idx, expert, name])
