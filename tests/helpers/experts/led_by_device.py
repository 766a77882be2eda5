"""Experts that the device brings by itself: run by test_experts_led.py, over the late fake device
in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixtures import EXPERTS, LAYERS, LAYOUTS, Experts, alone, check, same_bytes, unlike
from support import make_device, open_checkpoint
from triton_runs import FEW, INTERPRETED_HERE

from layer_streamer import ConfigError, LayerStreamer, StreamerError
from layer_streamer.experts.policies import make_policy
from layer_streamer.experts.slots import SlotTable
from layer_streamer.passes.expert_lead import DeviceLead
from layer_streamer.streamer import store_of

KIND = "fake" if INTERPRETED_HERE else "cuda"
WHERE = "cpu" if INTERPRETED_HERE else "cuda"
ASKED = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=5),
    min_size=LAYERS, max_size=LAYERS,
)  # fmt: skip
PLACES = ("take", "begin", "end", "give_back", "_upload", "_download")
"""Of a lead, where an interrupt may come: before it or after."""
LED_OR_NOT = st.lists(st.tuples(st.booleans(), ASKED), min_size=1, max_size=6)
quickly = settings(
    max_examples=3 if FEW else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def opened(path: Path, slots: int, **options: Any) -> LayerStreamer:
    given = {"experts": "demand", "expert_slots": slots, "read_threads": 2} | options
    return open_checkpoint(make_device(KIND), path, **given)


def handed_out(streamer: LayerStreamer) -> dict[int, Any]:
    """The experts of each layer that has some, after a pass."""
    found = {i: weights.experts for i, weights in streamer.sweep()}  # type: ignore[attr-defined]
    return {i: experts for i, experts in found.items() if experts is not None}


@contextmanager
def late_ids(streamer: LayerStreamer, ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """Numbers that are on the device only once the current stream has come to it."""
    device: Any = streamer._devices[0]
    found = torch.full((len(ids),), -1, dtype=torch.int64, device=WHERE)
    wanted = torch.tensor(ids, dtype=torch.int64)
    if isinstance(device, FakeDevice):
        device.launch(lambda: found.copy_(wanted))
    else:
        torch.cuda._sleep(100_000)
        found.copy_(wanted.cuda(), non_blocking=True)
    yield found


def led(
    streamer: LayerStreamer, layers: dict[int, Any], expected: Experts, asked: Sequence[Any]
) -> None:
    """One pass that the device leads: what lies in the slots that it names, once it has come there,
    is compared when all has been enqueued."""
    device: Any = streamer._devices[0]
    looks = list[tuple[int, Sequence[int], torch.Tensor, dict[str, torch.Tensor]]]()
    with streamer.experts_on_device():
        for layer_idx, experts in layers.items():
            with late_ids(streamer, asked[layer_idx]) as ids:
                slots = experts.load_on_device(ids)
            seen = {
                name: torch.empty(
                    (len(ids), *experts.bank(name).shape[1:]),
                    dtype=experts.bank(name).dtype, device=WHERE,
                )
                for name in experts.names
            }  # fmt: skip

            def look(experts: Any = experts, slots: Any = slots, seen: Any = seen) -> None:
                for name, out in seen.items():
                    out.copy_(experts.bank(name)[slots])

            device.launch(look)
            looks.append((layer_idx, asked[layer_idx], slots, seen))
    device.wait_idle()
    for layer_idx, ids, _, seen in looks:
        for name, found in seen.items():
            for expert, one in zip(ids, found.cpu(), strict=True):
                assert same_bytes(one, expected[layer_idx, expert, name])


@quickly
@given(passes=LED_OR_NOT, slots=st.integers(5, LAYERS * EXPERTS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_slot_that_a_device_names_holds_the_files_bytes(
    tmp_path_factory: pytest.TempPathFactory, layout: str, passes: Any, slots: int
) -> None:
    path = tmp_path_factory.mktemp("mixture")
    expected = LAYOUTS[layout](path)
    with opened(path, slots * 3) as streamer:
        layers = handed_out(streamer)
        assert streamer.most_on_device >= 5
        for by_device, asked in passes:
            if by_device:
                led(streamer, layers, expected, asked)
            else:
                check(streamer, expected, asked)


@quickly
@given(passes=LED_OR_NOT, slots=st.integers(5, LAYERS * EXPERTS))
def test_hits_are_those_of_the_policy_whoever_leads(
    tmp_path_factory: pytest.TempPathFactory, passes: Any, slots: int
) -> None:
    path = tmp_path_factory.mktemp("mixture")
    expected = alone(path)
    with opened(path, slots) as streamer:
        table = SlotTable(slots, make_policy("segmented", slots, 1))
        layers = handed_out(streamer)
        for by_device, asked in passes:
            hits = 0
            for layer_idx, ids in enumerate(asked):
                different = sorted(set(ids))
                placing = table.place([(layer_idx, expert) for expert in different])
                table.settle()
                hits += len(different) - len(placing.missing)
            (led(streamer, layers, expected, asked) if by_device else
             check(streamer, expected, asked))  # fmt: skip
            report = streamer.last_experts
            assert report is not None and report.hits == hits
            assert report.asked == sum(len(set(ids)) for ids in asked)
            assert report.needed == tuple((i, tuple(sorted(set(x)))) for i, x in enumerate(asked))
            each = {i: found.expert_nbytes for i, found in store_of(streamer).layers.items()}  # type: ignore[union-attr]
            assert report.copied_bytes == (report.asked - hits) * each[0]


def test_a_graph_of_a_pass_brings_whoever_is_asked_for(tmp_path: Path) -> None:
    if WHERE == "cpu":
        pytest.skip("nothing is captured")
    expected, dice = alone(tmp_path), random.Random(0)
    with opened(tmp_path, 8) as streamer:
        layers = handed_out(streamer)
        ids = torch.zeros(LAYERS, 3, dtype=torch.int64, device="cuda")
        slots, seen = torch.zeros_like(ids), {}

        def work() -> None:
            for layer_idx, experts in layers.items():
                slots[layer_idx] = experts.load_on_device(ids[layer_idx])
                for name in experts.names:
                    bank = experts.bank(name)
                    kept = seen.setdefault((layer_idx, name), torch.empty_like(bank[:3]))
                    kept.copy_(bank[slots[layer_idx]])

        with streamer.experts_on_device():
            work()
        graph = torch.cuda.CUDAGraph()
        with streamer.experts_on_device(), torch.cuda.graph(graph):
            work()
        for turn in range(40):
            asked = [dice.sample(range(EXPERTS), 3) for _ in range(LAYERS)]
            ids.copy_(torch.tensor(asked))
            with streamer.experts_on_device():
                graph.replay()
            for (layer_idx, name), found in seen.items():
                for expert, one in zip(asked[layer_idx], found.cpu(), strict=True):
                    assert same_bytes(one, expected[layer_idx, expert, name])
            if turn % 7 == 0:
                check(streamer, expected, asked)


def test_outside_of_its_pass_a_device_brings_nothing(tmp_path: Path) -> None:
    alone(tmp_path)
    with opened(tmp_path, 5) as streamer:
        layers = handed_out(streamer)
        ids = torch.zeros(1, dtype=torch.int64, device=WHERE)
        assert layers[0].load_on_device(ids) is None
        with streamer.experts_on_device():
            assert layers[0].load_on_device(ids) is not None
        for _, weights in streamer.sweep():
            assert weights.experts.load_on_device(ids) is None  # type: ignore[attr-defined]


def test_more_ids_than_a_device_brings_at_once_are_refused_and_harm_nobody(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, 5) as streamer:
        layers, asked = handed_out(streamer), [[0, 1, 2], [3], [4, 5]]
        for count in (streamer.most_on_device + 1, 1000):
            with (
                pytest.raises(ConfigError, match=r"layer 1.*brings 5"),
                streamer.experts_on_device(),
            ):
                layers[1].load_on_device(torch.zeros(count, dtype=torch.int64, device=WHERE))
            led(streamer, layers, expected, asked)
            check(streamer, expected, asked)


def test_numbers_of_no_expert_harm_nobody(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, 5) as streamer:
        layers = handed_out(streamer)
        device: Any = streamer._devices[0]
        with streamer.experts_on_device():
            ids = torch.tensor([-5, 2, EXPERTS, 1 << 30], device=WHERE)
            slots = layers[1].load_on_device(ids)
        device.wait_idle()
        assert all(0 <= slot < 5 for slot in slots.tolist())
        assert streamer.last_experts.needed == ((1, (2,)),)  # type: ignore[union-attr]
        check(streamer, expected, [[0, 1, 2], [2, 3, 4], [5, 6]])


def test_what_was_written_to_is_found_out_when_the_device_leads(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, 5) as streamer:
        layers = handed_out(streamer)
        device: Any = streamer._devices[0]
        with pytest.raises(StreamerError, match="written to"), streamer.experts_on_device():
            layers[0].load_on_device(torch.zeros(1, dtype=torch.int64, device=WHERE))
            device.wait_idle()
            layers[0].bank(layers[0].names[0]).zero_()
        for _ in range(2):
            led(streamer, layers, expected, [[0, 1], [2], [3, 3]])
            check(streamer, expected, [[0, 1], [2, 3], [0]])


def test_after_an_interrupt_wherever_the_lead_changes_everything_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, 6) as streamer:
        layers = handed_out(streamer)
        for turn, where in enumerate(PLACES):
            usual = getattr(DeviceLead, where)
            for after in (turn % 2 == 0,) if FEW else (False, True):

                def interrupted(*given: Any, after: bool = after, usual: Any = usual) -> Any:
                    if after:
                        usual(*given)
                    raise KeyboardInterrupt

                check(streamer, expected, [[1, 2], [3], [4, 5]])
                if where in ("give_back", "_download"):
                    led(streamer, layers, expected, [[0], [1, 2], [3]])
                with monkeypatch.context() as patched:
                    patched.setattr(DeviceLead, where, interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        led(streamer, layers, expected, [[0], [1, 2], [3]])
                        check(streamer, expected, [[3, 4, 5]] * LAYERS)
                led(streamer, layers, expected, [[0, 6], [1, 2], [3]])
                check(streamer, expected, [[3, 4, 5]] * LAYERS)


def test_without_page_locked_pages_of_all_experts_the_device_leads_nothing(tmp_path: Path) -> None:
    alone(tmp_path)
    with opened(tmp_path, 5, read_mode="buffered") as streamer:
        assert streamer.most_on_device == 0
        with pytest.raises(StreamerError, match="most_on_device"), streamer.experts_on_device():
            pass


def test_experts_of_two_kinds_have_tables_of_their_own(tmp_path: Path) -> None:
    expected = unlike(tmp_path)
    with opened(tmp_path, 10) as streamer:
        layers = handed_out(streamer)
        assert streamer.most_on_device == min(len(p) for p in store_of(streamer).pools.values())  # type: ignore[union-attr]
        for first in range(4):
            led(streamer, layers, expected, [[first, first + 1], [6 - first, first], []])


def test_a_load_of_too_many_by_the_host_is_refused_after_a_lead_too(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, 3) as streamer:
        layers = handed_out(streamer)
        led(streamer, layers, expected, [[0, 1], [2], [3]])
        with pytest.raises(ConfigError, match="in parts"):
            for _, weights in streamer.sweep():
                weights.experts.load(range(5))  # type: ignore[attr-defined]
        led(streamer, layers, expected, [[4, 5], [2], [3]])
