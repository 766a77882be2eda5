"""The memory plan of an engine over several devices: each has its own parts, within one budget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from fake_device import FakeDevice, named_twice, opened_as

from layer_streamer import preview
from layer_streamer.llm.drafts.opening import SelfPlan, Wanted, plan_draft
from layer_streamer.llm.memory.footprint import Footprint, Needs
from layer_streamer.llm.memory.memory_plan import MemoryPlan
from layer_streamer.llm.memory.placing import choose_device, choose_devices
from layer_streamer.llm.memory.plan import Planner
from layer_streamer.llm.memory.plan_table import device_parts
from layer_streamer.llm.memory.wishes import Wishes
from layer_streamer.llm.opening import Limits, Model, place, plan_memory

MIB = 1 << 20
LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    network = tiny_model("qwen2", num_hidden_layers=LAYERS, max_position_embeddings=1 << 16)
    return Model.read(tiny_checkpoint(tmp_path_factory.mktemp("plans"), network), print)


@pytest.fixture
def free() -> list[int]:
    """What each device has, bytes."""
    return [1 << 40, 1 << 40, 1 << 40]


@pytest.fixture(autouse=True)
def gpus(free: list[int]) -> Iterator[None]:
    def make(number: int) -> FakeDevice:
        device = FakeDevice(0)
        device.free_bytes = lambda: free[number]  # type: ignore[method-assign]
        return device

    with opened_as(make), named_twice():
        yield


def plan(model: Model, count: int = 2, **wishes: Any) -> MemoryPlan:
    options, dtype = place(model, ["cpu"] * count, None, wishes.pop("options", {}))
    return plan_memory(model, Limits(4096), Wishes(options=options, **wishes), dtype)[0]


def least(error: BaseException) -> int:
    found = re.search(r"at least (\d+) bytes", str(error))
    assert found is not None, error
    return int(found[1])


@pytest.mark.parametrize("count", [2, 3])
def test_each_device_has_the_keys_and_values_of_its_own_layers(model: Model, count: int) -> None:
    one, found = plan(model, 1), plan(model, count)
    assert len(found.devices) == count and one.others == ()
    for parts in found.devices:
        assert parts["keys and values"] == one.device["keys and values"] // count
        for name in ("residual stream", "static tensors", "scratch", "temporaries"):
            assert parts[name] == one.device[name], name


@pytest.mark.parametrize("wishes", [
    {"device_budget": "40MiB"}, {"device_budget": "40MiB", "kv": "host"},
    {"device_budget": "auto", "reserve_bytes": 3 * MIB}, {"device_budget": "21MiB"},
])  # fmt: skip
def test_the_parts_of_each_device_sum_up_to_the_budget(model: Model, wishes: Any) -> None:
    found = plan(model, 2, **wishes)
    streamer = preview.plan_checkpoint(model.manifest, **found.options)
    assert found.options["reserve_bytes"] == list(found.reserves)
    for number, taken in enumerate(streamer.placement.device_bytes):
        parts = device_parts(found, number)
        assert sum(parts.values()) == found.device_budget and min(parts.values()) >= 0
        assert parts["resident layers"] + parts["slots"] == taken
        assert parts["reserved"] == wishes.get("reserve_bytes", 0)


@pytest.mark.parametrize("kv", ["auto", "host", "device"])
def test_the_least_budget_of_each_device_is_named_and_works(model: Model, kv: str) -> None:
    with pytest.raises(ValueError, match=r"needed on cpu \(layers") as caught:
        plan(model, 2, device_budget=1, kv=kv)
    enough = least(caught.value)
    assert plan(model, 2, device_budget=enough, kv=kv).device_nbytes == enough
    with pytest.raises(ValueError, match=f"at least {enough} bytes"):
        plan(model, 2, device_budget=enough - 1, kv=kv)


def test_what_the_fullest_device_has_free_is_the_limit_of_all(
    model: Model, free: list[int]
) -> None:
    with pytest.raises(ValueError, match="needed on") as caught:
        plan(model, 2, device_budget=1)
    free[1] = least(caught.value) - 1
    with pytest.raises(ValueError, match="free memory"):
        plan(model, 2)
    assert plan(model, 1).device_nbytes > free[1], "the first one has room"


def test_more_than_two_devices_hold_more_layers_ahead_where_there_is_room(model: Model) -> None:
    assert plan(model, 2).options["n_gpu"] == 2 < plan(model, 3).options["n_gpu"] == 4
    with pytest.raises(ValueError, match="at least") as caught:
        plan(model, 3, device_budget=1)
    tight = plan(model, 3, device_budget=least(caught.value))
    assert tight.options["n_gpu"] == 1 and tight.chunk == 256


def test_the_table_has_a_paragraph_for_each_device(model: Model) -> None:
    table = str(plan(model, 2, device_budget="40MiB"))
    assert table.count("device cpu: ") == 2
    assert table.count(" of 3 layers") >= 2 and "tokens of 3 layers" in table


def test_layers_are_captured_on_each_device_whether_some_stream_or_none(model: Model) -> None:
    options, _ = place(model, ["cpu", "cpu"], None, {})
    needs = Needs(
        kv_tokens=4096, max_batch=8, dtype=torch.float32, device_type="cuda", int8=False,
        packed_nbytes=0, captured_rows_streamed=8,
    )  # fmt: skip
    footprint, seen = Footprint(model.config, needs), set()
    for kv in ("auto", "host"):
        wishes = Wishes(options=options, device_budget="2GiB", kv=kv)
        found = Planner(model.manifest, footprint, wishes).make()
        assert found.captures_layers and not found.captures
        for parts in found.devices:
            assert parts["captured layers"] == footprint.captured_layers()
        assert found.options["reserve_bytes"] == list(found.reserves)
        assert str(found).count("captured layers") == 2
        seen.add(bool(found.host_layers))
    assert seen == {False, True} and set(found.streamer.tiers) == {"device"}


@pytest.mark.parametrize("count", [2, 3])
def test_a_draft_of_own_weights_takes_of_each_gpu_what_its_layers_do(
    model: Model, count: int
) -> None:
    def drafted(number: int) -> SelfPlan:
        devices = [torch.device("cuda", i) for i in range(number)]
        wishes = Wishes(options={"device": devices})
        limits, wanted = Limits(4096), Wanted(own_weights=True)
        found = plan_draft(wanted, model, limits, wishes, torch.bfloat16)
        assert isinstance(found, SelfPlan)
        return found

    one, several = drafted(1), drafted(count)
    layers = one.own.nbytes
    assert len(one.nbytes) == 1 and len(layers) == LAYERS and several.own.nbytes == layers
    for number, nbytes in enumerate(several.nbytes):
        assert one.nbytes[0] - nbytes == sum(layers) - sum(layers[number::count])
    assert len(several.nbytes) == count


def test_more_devices_than_layers_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="7 of them for 6 layers"):
        place(model, ["cpu"] * 7, None, {})


def test_devices_are_named_by_a_list_or_in_one_text() -> None:
    two = (torch.device("cuda:0"), torch.device("cuda:1"))
    for names in (["cuda:0", "cuda:1"], "cuda:0,cuda:1", "cuda:0, cuda:1", two):
        assert choose_devices(names) == two
    assert choose_devices("cpu") == (torch.device("cpu"),)
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cuda:0", "cuda:0"], "cuda:0,cuda:0: a device is named twice"),
        ("cpu,cpu", "named twice"),
        ("cuda:0,cpu", "cuda:0,cpu: must be devices of one kind"),
        ([], "must name a device"),
        ("cuda:0,gpu7", "'gpu7': not a torch device"),
        ("cuda:0,", "'': not a torch device"),
        ([3.5], r"3\.5: not a torch device"),
    ],
)
def test_devices_that_cannot_go_together_are_refused_in_one_line(names: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        choose_devices(names)
    assert "\n" not in str(caught.value)


def test_one_device_is_taken_where_several_make_no_sense() -> None:
    with pytest.raises(ValueError, match="one device is taken"):
        choose_device("cuda:0,cuda:1")
