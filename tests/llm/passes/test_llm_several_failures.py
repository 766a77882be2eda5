"""What goes wrong on one of several devices is said in a line, costs the texts of its pass, and
leaves nothing: the next request is exact."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import edit_weights
from byte_model import byte_model
from fake_device import NearDevice, named_twice, opened_as
from interrupter import Interrupt, Interrupter
from packed_models import write_packed
from small_engine import PROMPTS, make_engine, message
from support import FailingDisk, footprint, held_nbytes, in_thread
from zoo import zoo_model

from layer_streamer import ClosedError, ReadError
from layer_streamer.llm.drafts import own_weights
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import EngineError, NotFiniteError, UnsupportedModelError
from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.kv.host import HostTier
from layer_streamer.llm.on_device.side import DeviceSide

LAYERS = 5
TWO, THREE = ["cpu"] * 2, ["cpu"] * 3
ASKED: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0, "return_details": True}
FEW_SLOTS: dict[str, Any] = {"read_mode": "buffered", "n_gpu": 0, "n_cpu_pinned": 1, "n_cpu": 0}
"""Most layers are read in each pass."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return byte_model(tmp_path_factory.mktemp("several"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    with make_engine(path) as engine:
        return ids_of(engine)


@pytest.fixture(autouse=True)
def devices_of_their_own() -> Iterator[None]:
    with opened_as(lambda number: NearDevice()), named_twice():
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(path: Path, expected: Any) -> Iterator[None]:
    """No thread, no open file; what the process keeps for good has been taken by now."""
    held_nbytes()
    before = footprint()
    yield
    held_nbytes()
    assert footprint() == before


def ids_of(engine: StreamingEngine) -> list[list[int]]:
    return [list(done.ids) for done in engine.generate(PROMPTS, **ASKED)]


def goes_on(engine: StreamingEngine, expected: list[list[int]]) -> None:
    """All rows are gone, and the next texts are as ever."""
    assert list(engine._runner.kv.rows) == [] and not engine.scheduler.running
    assert ids_of(engine) == expected


def fails_in(layer_idx: int, act: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Have something happen in a layer, once its keys are stored."""
    close = KVCache.close_layer

    def closes(kv: KVCache, index: int) -> None:
        close(kv, index)
        if index == layer_idx:
            act()

    patch.setattr(KVCache, "close_layer", closes)


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nfor debugging consider"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has\n0 bytes free"),
    MemoryError(),
]


@pytest.mark.parametrize("layer_idx", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "error",
    [ERRORS[0], *(pytest.param(error, marks=pytest.mark.slow) for error in ERRORS[1:])],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("devices", [TWO, pytest.param(THREE, marks=pytest.mark.slow)], ids=len)
def test_what_a_layer_of_another_device_raises_is_said_and_the_next_texts_are_exact(
    path: Path, expected: Any, error: Exception, layer_idx: int, devices: list[str]
) -> None:
    with make_engine(path, device=devices, kv="host", lookup=True, **FEW_SLOTS) as engine:
        assert ids_of(engine) == expected
        with pytest.MonkeyPatch.context() as patch:
            fails_in(layer_idx, raising(error), patch)
            for done in engine.generate(PROMPTS, **ASKED):
                assert done.finish_reason == "error"
                assert type(error).__name__ in message(done.error)
        goes_on(engine, expected)


@pytest.mark.parametrize("layer_idx", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_layer_of_another_device_that_cannot_be_read_is_named(
    path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, layer_idx: int
) -> None:
    with make_engine(path, device=TWO, kv="host", **FEW_SLOTS) as engine:
        assert engine.streamer.plan.tiers[layer_idx] == "disk"
        specs = engine.model.manifest.layers[layer_idx].tensors.values()
        middle = max(specs, key=lambda spec: spec.nbytes)
        disk = FailingDisk(middle.offset + middle.nbytes // 2, errno.EIO)
        monkeypatch.setattr(os, "preadv", disk)
        for _ in range(2):
            disk.times = 1
            with pytest.raises(ReadError, match=rf"layer {layer_idx}, .*Input/output") as caught:
                for _ in range(3):  # it may have been read ahead by then
                    ids_of(engine)
            assert "model.safetensors" in message(caught.value)
            goes_on(engine, expected)


@pytest.mark.parametrize("where", ["prompt", "decoding"])
@pytest.mark.parametrize("layer_idx", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_in_a_layer_of_another_device_ends_its_call_alone(
    path: Path, expected: Any, where: str, layer_idx: int
) -> None:
    with make_engine(path, device=TWO, kv="host", prefill_chunk=5, **FEW_SLOTS) as engine:
        left = 0 if where == "prompt" else 2

        def act() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fails_in(layer_idx, act, patch)
            ids_of(engine)
        goes_on(engine, expected)


@pytest.mark.parametrize("stride", [701, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [1, 20])
def test_an_interrupt_at_a_line_of_a_pass_over_two_devices_leaves_the_rows_as_they_were(
    path: Path, stride: int, count: int
) -> None:
    asked, found, number, fired = [8] * count, list[torch.Tensor](), 0, True
    with make_engine(path, device=TWO, kv="host", prefill_chunk=8, **FEW_SLOTS) as engine:
        runner = engine._runner
        row = runner.kv.rows.add(60)
        assert row is not None
        runner.forward([(row, [5, 6, 7] * 3)])
        while fired:
            with suppress(Interrupt), Interrupter(number, "line") as interrupter:
                runner.forward([(row, asked)])
            runner.kv.rows.truncate(row, 9)
            found.append(runner.forward([(row, asked)]))
            runner.kv.rows.truncate(row, 9)
            number, fired = number + stride, interrupter.fired
    assert len(found) > 5 and all(torch.equal(logits, found[-1]) for logits in found)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [None, "self"])
def test_an_interrupt_at_a_line_of_texts_over_two_devices_leaves_nothing(
    path: Path, expected: Any, draft: str | None
) -> None:
    kv, number, fired = "host" if draft is None else "device", 0, True
    with make_engine(path, device=TWO, kv=kv, draft=draft, **FEW_SLOTS) as engine:
        while fired:
            with suppress(Interrupt), Interrupter(number, "line", ("llm/text",)) as interrupter:
                ids_of(engine)
            goes_on(engine, expected)
            number, fired = number + 401, interrupter.fired


def test_the_streamer_may_be_closed_while_another_device_computes(path: Path) -> None:
    with make_engine(path, device=TWO, kv="host", **FEW_SLOTS) as engine:
        with pytest.MonkeyPatch.context() as patch:
            fails_in(3, lambda: in_thread(engine.streamer.close), patch)
            with pytest.raises(ClosedError) as caught:
                ids_of(engine)
        assert message(caught.value) and list(engine._runner.kv.rows) == []
        with pytest.raises(ClosedError):
            ids_of(engine)


def test_an_engine_is_not_closed_by_one_of_its_own_layers(path: Path, expected: Any) -> None:
    with make_engine(path, device=TWO, kv="host") as engine:
        with pytest.MonkeyPatch.context() as patch:
            fails_in(3, engine.close, patch)
            (done,) = engine.generate(PROMPTS[:1], **ASKED)
            assert "a pass is under way" in message(done.error)
        goes_on(engine, expected)


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. GPU 1\nhas 0 bytes free")


class FullDevice(NearDevice):
    """One whose memory has run out."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        raise full()


class FullTier(HostTier):
    """Slots for which there is no room."""

    def allocate(self, num_slots: int) -> None:
        if 1 in self._layers:
            raise full()
        super().allocate(num_slots)


@pytest.mark.parametrize("what", ["slots", "slots of keys", "side", "draft"])
def test_a_second_device_without_room_for_its_part_leaves_nothing_on_the_first(
    path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    options: dict[str, Any] = {"device": TWO, **FEW_SLOTS}
    options |= {"draft": "self"} if what == "draft" else {"kv": "host"}
    start, rounded = DeviceSide.__init__, own_weights._round
    calls = 0

    def starts(side: DeviceSide, number: int, *given: Any) -> None:
        if number:
            raise full()
        start(side, number, *given)

    def rounds(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 10:  # of the second layer
            raise full()
        return rounded(*given)

    with pytest.MonkeyPatch.context() as patch:
        if what == "slots":
            devices = [NearDevice(), FullDevice()]
            patch.setattr("layer_streamer.streamer.open_devices", lambda wanted: tuple(devices))
        elif what == "slots of keys":
            patch.setattr("layer_streamer.llm.kv.cache.HostTier", FullTier)
        elif what == "side":
            patch.setattr(DeviceSide, "__init__", starts)
        else:
            patch.setattr(own_weights, "_round", rounds)
        before = footprint(), held_nbytes()
        with pytest.raises(EngineError, match=r"OutOfMemoryError: .*GPU 1 has 0") as caught:
            make_engine(path, **options)
        assert "the engine cannot be opened" in message(caught.value)
        del caught
        after = held_nbytes()
        assert (footprint(), after) == before
    with make_engine(path, **options) as engine:
        assert ids_of(engine) == expected and held_nbytes() > before[1]
    del engine
    assert held_nbytes() == before[1]


@pytest.mark.parametrize("layer_idx", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_numbers_that_are_none_on_another_device_are_traced_to_their_layer(
    path: Path, tmp_path: Path, layer_idx: int
) -> None:
    spoiled = byte_model(tmp_path, num_hidden_layers=LAYERS)
    name = f"model.layers.{layer_idx}.mlp.up_proj.weight"
    edit_weights(spoiled, lambda tensors: tensors[name].fill_(math.nan))
    for options in ({}, {"kv": "host"}, {"host_layers": [layer_idx]}):
        with make_engine(spoiled, device=TWO, **options) as engine:
            with pytest.raises(NotFiniteError) as caught:
                engine.generate(PROMPTS[0], max_new_tokens=2)
            said = message(caught.value)
            assert f"that of layer {layer_idx}: its tensor {name!r}" in said


@pytest.mark.parametrize("layer_idx", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_scale_that_is_no_number_on_another_device_is_named(
    tmp_path: Path, layer_idx: int
) -> None:
    packed = write_packed(tmp_path, zoo_model("qwen2"), "ct8-g32")
    name = f"model.layers.{layer_idx}.mlp.up_proj.weight_scale"
    edit_weights(packed, lambda tensors: tensors[name].view(-1)[7:8].fill_(math.inf))
    with make_engine(packed, device=THREE) as engine:
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="scales that are not finite") as caught:
                engine.generate(PROMPTS[0], max_new_tokens=2, return_details=True)
            assert name in message(caught.value) and list(engine._runner.kv.rows) == []
