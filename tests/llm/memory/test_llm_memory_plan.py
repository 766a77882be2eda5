"""The memory plan: what fits where, the least budget, and whether the engine keeps to it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from fake_device import FakeDevice

from layer_streamer import preview
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.memory import plan as planning
from layer_streamer.llm.memory import wishes as wishes_module
from layer_streamer.llm.memory.footprint import Footprint, Needs
from layer_streamer.llm.memory.memory_plan import MemoryPlan
from layer_streamer.llm.memory.plan import Planner
from layer_streamer.llm.memory.plan_table import device_parts, host_parts
from layer_streamer.llm.memory.wishes import Wishes
from layer_streamer.llm.opening import Limits, Model, place, plan_memory

MIB = 1 << 20
WINDOWS = {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen2", num_hidden_layers=6, max_position_embeddings=1 << 16)
    return tiny_checkpoint(tmp_path_factory.mktemp("plan"), model)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Plans are made for a device with memory of its own: 1 TiB of it."""
    device = FakeDevice(0)
    monkeypatch.setattr(preview, "open_devices", lambda wanted: (device,))
    return device


def plan(path: Path, limits: dict[str, Any] | None = None, **wishes: Any) -> MemoryPlan:
    model = Model.read(path, print)
    options, dtype = place(model, "cpu", None, wishes.pop("options", {}))
    limits = {"max_length": 4096} | (limits or {})
    return plan_memory(model, Limits(**limits), Wishes(options=options, **wishes), dtype)[0]


def least(message: str) -> int:
    found = re.search(r"at least (\d+) bytes", message)
    assert found is not None, message
    return int(found[1])


def test_everything_is_on_the_device_where_it_fits(path: Path, gpu: FakeDevice) -> None:
    found = plan(path)
    assert found.host_layers == () and found.host["keys and values"] == 0
    assert found.device["keys and values"] == 6 * 4096 * 2 * 2 * 16 * 4
    assert found.device["residual stream"] == 4096 * 64 * 4
    assert found.chunk == 2048 and "device_budget" not in found.options


@pytest.mark.parametrize("kv", ["auto", "host", "device"])
def test_the_least_budget_that_is_named_is_the_least_that_works(
    path: Path, gpu: FakeDevice, kv: str
) -> None:
    with pytest.raises(ValueError) as caught:
        plan(path, device_budget=MIB, kv=kv)
    message = str(caught.value)
    assert "device_budget 1.00 MiB" in message and "\n" not in message
    enough = plan(path, device_budget=least(message), kv=kv)
    assert enough.device_nbytes == least(message)
    assert (enough.chunk, enough.options["n_gpu"]) == (256, 1)
    with pytest.raises(ValueError, match=f"at least {least(message)} bytes"):
        plan(path, device_budget=least(message) - 1, kv=kv)


def test_more_budget_puts_more_layers_on_the_device_and_never_exceeds_it(
    path: Path, gpu: FakeDevice
) -> None:
    with pytest.raises(ValueError) as caught:
        plan(path, device_budget=1)
    first, before = least(str(caught.value)), 0
    seen = set()
    for budget in range(first, first + 30 * MIB, MIB // 2):
        found = plan(path, device_budget=budget, prefill_chunk=256, options={"n_gpu": 1})
        on_device = 6 - len(found.host_layers)
        assert found.device_nbytes <= budget and on_device >= before
        assert found.options["device_budget"] == budget
        assert found.options["reserve_bytes"] == found.reserve_nbytes
        seen.add(on_device)
        before = on_device
    assert {0, 6} <= seen and len(seen) > 3


def test_layers_that_are_spilled_are_spread_and_windows_come_last(
    tmp_path: Path, gpu: FakeDevice
) -> None:
    model = tiny_model("qwen2", num_hidden_layers=6, max_position_embeddings=1 << 16, **WINDOWS)
    path = tiny_checkpoint(tmp_path, model)
    one = {"n_gpu": 0}
    whole = plan(path, {"max_batch": 1}, options=one)
    assert whole.device["keys and values"] == (5 * 4096 + 512) * 256, "the last has a ring of 512"
    tight = whole.device_nbytes - 1
    found = plan(path, {"max_batch": 1}, device_budget=tight, prefill_chunk=2048, options=one)
    # One slot costs what one layer spares.
    assert found.host_layers == (1, 3)


def test_host_memory_is_shared_out_as_well(path: Path, gpu: FakeDevice) -> None:
    options = {"n_cpu_pinned": 1}
    with pytest.raises(ValueError, match=r"host_budget 1\.00 MiB") as caught:
        plan(path, kv="host", host_budget=MIB, options=options)
    found = plan(path, kv="host", host_budget=least(str(caught.value)), options=options)
    kv = found.host["keys and values"]
    assert kv == 6 * 4096 * 256
    embedding = found.host["embedding"]
    assert found.options["host_budget"] == least(str(caught.value)) - kv - embedding
    with pytest.raises(ValueError, match="host_budget"):
        plan(path, kv="host", host_budget=least(str(caught.value)) - 1, options=options)


def test_keys_and_values_that_exceed_free_host_memory_are_refused(
    path: Path, gpu: FakeDevice
) -> None:
    gpu.free_bytes = lambda: 1 << 60  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"free host memory .* keys and values .*grant"):
        plan(path, {"max_length": 1 << 16, "kv_tokens": 1 << 34}, kv="host", prefill_chunk=1)


def test_int8_takes_less_of_the_host(path: Path, gpu: FakeDevice) -> None:
    whole, eighth = (plan(path, {"kv_int8": b}, kv="host") for b in (False, True))
    assert eighth.host["keys and values"] < 0.3 * whole.host["keys and values"]


NEEDS = Needs(
    kv_tokens=4096, max_batch=8, dtype=torch.float32, device_type="cuda", int8=False,
    packed_nbytes=0, captured_rows=8, captured_rows_streamed=8,
)  # fmt: skip


def captured_plan(path: Path, rows: int = 8, **wishes: Any) -> MemoryPlan:
    """The plan for a GPU on which passes may be captured."""
    model = Model.read(path, print)
    options, _ = place(model, "cpu", None, {})
    needs = replace(NEEDS, captured_rows=rows, captured_rows_streamed=rows)
    footprint = Footprint(model.config, needs)
    return Planner(path, footprint, Wishes(options=options, **wishes)).make()


def test_captured_passes_have_room_exactly_where_nothing_streams(
    path: Path, gpu: FakeDevice
) -> None:
    options: dict[str, Any] = {"device_budget": "2GiB"}
    found = captured_plan(path, **options)
    nbytes = found.device["captured passes"]
    assert found.captures and nbytes > 128 * MIB and "captured passes" in str(found)
    assert found.options["reserve_bytes"] == found.reserve_nbytes
    assert not captured_plan(path, 0, **options).captures
    assert not captured_plan(path, kv="host", **options).captures
    assert not captured_plan(path).captures, "without a budget, layers stream"
    # The least budget with which all is on the device: one page less, and something streams.
    low, high = 0, 2 << 30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = captured_plan(path, device_budget=middle, prefill_chunk=256).captures
        except ValueError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    for budget, captures in ((high, True), (high - 1, False)):
        found = captured_plan(path, device_budget=budget, prefill_chunk=256)
        assert found.captures == captures
        streamer = preview.plan_checkpoint(path, **found.options)
        assert (set(streamer.tiers) == {"device"}) or not captures
        assert found.reserve_nbytes + streamer.placement.device_bytes[0] <= budget


@pytest.mark.parametrize("wishes", [{"kv": "host"}, {"kv": "device"}, {"kv": "auto"}], ids=str)
def test_captured_layers_have_room_where_little_streams(
    path: Path, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch, wishes: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"prefill_chunk": 256, **wishes}
    with pytest.raises(ValueError) as caught:
        captured_plan(path, device_budget=1, **options)
    tight = least(str(caught.value)) + (0 if wishes["kv"] == "device" else 4 * MIB)
    bare = captured_plan(path, device_budget=tight, **options)
    assert not (bare.captures or bare.captures_layers), "there is no room for it"
    nbytes = Footprint(Model.read(path, print).config, NEEDS).captured_layers()
    enough = tight + nbytes + (256 << 10)  # another slot for layers
    found = captured_plan(path, device_budget=enough, **options)
    assert found.captures_layers != found.captures
    assert wishes["kv"] == "auto" or found.device["captured layers"] == nbytes
    assert not captured_plan(path, 0, device_budget=enough, **options).captures_layers
    assert found.options["reserve_bytes"] == found.reserve_nbytes
    # The same, if each layer were large, or the link slow.
    monkeypatch.setattr(planning, "LAUNCHED_NBYTES", 0)
    slow = captured_plan(path, device_budget=enough, **options)
    streams = set(found.streamer.tiers) != {"device"}
    assert slow.captures_layers == (found.captures_layers and not streams)


def test_where_nothing_streams_there_is_room_for_whole_passes_or_for_none(
    path: Path, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Footprint(Model.read(path, print).config, NEEDS).captured_layers()
    whole = layers + 16 * MIB  # as if there were many heads
    monkeypatch.setattr(Footprint, "captured", lambda self: whole)
    options: dict[str, Any] = {"prefill_chunk": 256}
    roomy = captured_plan(path, device_budget="2GiB", **options)
    sizes = [size.device_nbytes for size in roomy.streamer.sizes]
    resident = roomy.device_nbytes - roomy.device["layers"] - whole + sum(sizes) + MIB
    for budget, captures in ((resident + whole, True), (resident + layers, False)):
        found = captured_plan(path, device_budget=budget, **options)
        assert set(found.streamer.tiers) == {"device"}
        assert (found.captures, found.captures_layers) == (captures, False)


BUDGETS: tuple[dict[str, Any], ...] = (
    {"device_budget": "24MiB", "prefill_chunk": 256},
    {"device_budget": "24MiB", "prefill_chunk": 256, "kv": "host", "host_budget": "1GiB"},
    {"device_budget": "100MiB", "reserve_bytes": "3MiB"},
    {"host_budget": "1GiB", "kv": "host", "options": {"n_cpu_pinned": 1}},
    {},
)


@pytest.mark.parametrize("wishes", BUDGETS, ids=str)
def test_the_parts_of_the_plan_sum_up_to_its_budgets(
    path: Path, gpu: FakeDevice, wishes: dict[str, Any]
) -> None:
    found = plan(path, **wishes)
    streamer = preview.plan_checkpoint(path, **found.options)
    device, host = device_parts(found), host_parts(found)
    assert sum(device.values()) == found.device_budget
    assert device["resident layers"] + device["slots"] == streamer.placement.device_bytes[0]
    assert host["resident layers"] + host["slots"] == streamer.placement.host_bytes
    assert found.host_budget is None or sum(host.values()) == found.host_budget
    assert min(*device.values(), *host.values()) >= 0, "nothing is overdrawn"
    assert device["reserved"] == (3 * MIB if "reserve_bytes" in wishes else 0)


def test_the_parts_of_a_plan_for_a_cpu_sum_up_to_its_budget(path: Path) -> None:
    device = device_parts(plan(path, device_budget="40MiB", prefill_chunk=256))
    assert sum(device.values()) == 40 * MIB and device["spare"] >= 0
    assert "spare" not in device_parts(plan(path, options={"n_gpu": 1}))


def test_all_that_fits_in_free_memory_stays_on_a_cpu_unless_the_way_of_layers_is_named(
    path: Path,
) -> None:
    found = plan(path)
    assert "device_budget" in found.options and not found.named
    assert set(found.streamer.tiers) == {"device"}
    assert "streamed each pass" not in str(found) and "free memory less a margin" in str(found)
    for way in ({"n_gpu": 1}, {"n_cpu": 0}, {"read_mode": "buffered"}):
        named = plan(path, options=way)
        assert "device_budget" not in named.options
        assert set(named.streamer.tiers) == {"disk"}


def test_a_cpu_that_is_short_of_memory_is_given_no_budget_that_nobody_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes_module, "usable", lambda nbytes: MIB)
    found = plan(path)
    assert found.device_budget is None and set(found.streamer.tiers) == {"disk"}
    with pytest.raises(ValueError, match=r"device_budget 1\.00 MiB: at least"):
        plan(path, device_budget="auto")


def test_the_plan_says_where_everything_is_and_what_streams(path: Path, gpu: FakeDevice) -> None:
    whole = str(plan(path, device_budget="100MiB"))
    for part in (
        "of a budget of 100 MiB",
        "6 of 6 layers, output head",
        "4,096 tokens of 6 layers",
    ):
        assert part in whole
    assert "streamed each pass" not in whole and "spare" in whole
    tight = str(plan(path, device_budget="24MiB", prefill_chunk=256, kv="host"))
    assert "host: " in tight and "keys and values of 6 layers pass through" in tight
    streamed = plan(path)
    assert "streamed each pass: 6 of 6 layers" in str(streamed)
    assert "free memory less a margin" in str(streamed)


def test_a_budget_on_a_cpu_holds_for_engine_and_streamer_together(path: Path) -> None:
    for name in ("device_budget", "host_budget"):
        with pytest.raises(ValueError, match="at least") as caught:
            StreamingEngine(path, device="cpu", max_length=64, **{name: MIB})
        budget = least(str(caught.value))
        with StreamingEngine(path, device="cpu", max_length=64, **{name: budget}) as engine:
            assert engine.plan.device_nbytes == budget
            assert engine.streamer.memory.host_bytes <= engine.plan.device["layers"] + 10 * 4096


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["auto", "host", "device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_peak_on_a_gpu_stays_inside_the_plan(tmp_path: Path, kv: str, dtype: Any) -> None:
    model = tiny_model(
        "qwen2", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, vocab_size=32000,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1 << 15,
    )  # fmt: skip
    path = tiny_checkpoint(tmp_path, model)
    options = {"device": "cuda", "dtype": dtype, "max_length": 8192, "kv_tokens": 16384, "kv": kv}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    budget = "900MiB"
    with StreamingEngine(path, device_budget=budget, max_batch=16, **options) as engine:
        engine.generate([[i] * 4000 for i in range(4)], max_new_tokens=20, return_details=True)
        engine.generate([[i] * 700 for i in range(16)], max_new_tokens=20, return_details=True)
        engine.generate([3] * 8000, max_new_tokens=20, return_details=True, temperature=1.0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - before
        assert peak <= 900 * MIB, f"{peak / MIB:.0f} MiB reserved\n{engine.plan}"


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_names_the_least_budget(path: Path) -> None:
    with pytest.raises(ValueError, match="at least") as caught:
        StreamingEngine(path, device="cuda", max_length=1024, device_budget="1MiB")
    budget = least(str(caught.value))
    with StreamingEngine(path, device="cuda", max_length=1024, device_budget=budget) as engine:
        assert engine.plan.device_nbytes <= budget
