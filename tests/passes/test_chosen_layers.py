"""``layers=``: some of a checkpoint's layers, or another order of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import odd_checkpoint, tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routes import make_devices, nothing, of_tier, open_route
from support import FailingDisk, Witness, make_device, open_checkpoint, raw

from layer_streamer import ConfigError, LayerStreamer, ReadError, plan_checkpoint

COUNT = 20
"""Half of them are more than the slots of a route and its resident layers have room for, also
where the chosen layers lie so that a slot is twice as large as a layer."""
CHOICES: dict[str, Sequence[int]] = {
    "some in any order": [7, 2, 13, 9, 0, 11, 19, 4, 16, 5],
    "every second": range(0, COUNT, 2),
    "the last half, reversed": range(COUNT - 1, COUNT // 2 - 1, -1),
}
TAIL = ["lm_head.weight"]


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path / "model"
    return path, tiny_checkpoint(path, COUNT, hidden=40, num_shards=2)


@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_layers_come_in_their_order_with_their_own_bytes_on_every_route(
    model: tuple[Path, dict[str, torch.Tensor]], route: str, choice: str
) -> None:
    layers, devices, copied = CHOICES[choice], make_devices(route), list[int]()
    witness = Witness(devices, model[1], order=layers)
    options = {"layers": layers, "on_copy": lambda layer_idx, stream: copied.append(layer_idx)}
    with open_route(route, model[0], devices, **options) as streamer:
        for _ in range(3):
            streamer.run_pass(None, witness)
        report = streamer.last_pass
        plan = streamer.plan
    witness.check()
    assert witness.layers == 3 * list(layers)
    assert plan.layers == tuple(layers)
    assert report is not None
    assert report.num_layers == len(plan.tiers) == len(layers)
    there = plan.host_layers
    elsewhere = [layer for layer in layers if layer not in there]
    assert [span.layer_idx for span in report.steps["compute"].spans] == elsewhere
    assert set(copied) == set(elsewhere)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("odd")
    return path, odd_checkpoint(path)


@pytest.mark.parametrize("kind", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.permutations(range(7)).flatmap(
        lambda order: st.integers(1, 7).map(lambda count: order[:count])
    ),
    pools=st.sampled_from([{}, {"n_cpu_pinned": 1}, {"n_cpu": 2, "n_cpu_pinned": 0}]),
    budget=st.sampled_from([None, "130KiB"]),
    read_mode=st.sampled_from(["auto", "buffered", "direct", "mapped"]),
)
def test_any_order_of_any_odd_layers_is_exact(
    odd: Any, kind: str, layers: list[int], pools: Any, budget: str | None, read_mode: Any
) -> None:
    device = make_device(kind)
    witness = Witness(device, odd[1], order=layers)
    options = (
        {**pools, "host_budget": budget} if kind == "fake" and read_mode != "mapped" else pools
    )
    with open_checkpoint(
        device, odd[0], layers=layers, n_gpu=1, read_mode=read_mode, read_chunk=4096, **options
    ) as streamer:
        for _ in range(2):
            streamer.run_pass(None, witness)
        assert witness.layers == 2 * layers
        witness.check()


def test_the_tail_comes_after_the_last_chosen_layer_and_is_numbered_after_all_layers(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    with LayerStreamer.from_checkpoint(
        model[0], device="cpu", layers=[3, 1], tail=TAIL
    ) as streamer:
        assert streamer.num_layers == COUNT
        seen, rows = [], []
        for layer_idx, weights in streamer.sweep():
            seen.append(layer_idx)
            rows += [raw(w).clone() for name, w in weights.items() if name == TAIL[0]]
        assert seen == [3, 1, *range(COUNT, COUNT + len(rows))] == list(streamer.plan.layers)
        assert streamer.num_steps == len(seen)
        assert torch.equal(torch.cat(rows), raw(model[1][TAIL[0]]))
        with pytest.raises(ConfigError, match=r"layers\[0\]=20: must be an int from 0 to 19"):
            open_checkpoint(None, model[0], layers=[COUNT], tail=TAIL)


def test_the_plan_says_of_each_layer_where_it_lives_by_its_index_in_the_checkpoint(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    options: dict[str, Any] = {"device": "cpu", "layers": [8, 4, 6, 2, 10, 0], "n_gpu": 0}
    slots = plan_checkpoint(model[0], n_cpu_pinned=1, **options).placement.device_bytes[0]
    options |= {"n_cpu_pinned": 1, "device_budget": slots + 45_000}
    plan = plan_checkpoint(model[0], **options)
    assert set(plan.tiers) == {"device", "disk"}
    with LayerStreamer.from_checkpoint(model[0], **options) as streamer:
        assert streamer.plan.document() == plan.document()
        addresses: list[set[tuple[int, int]]] = []
        for _ in range(2):
            found = [(i, w["input_layernorm.weight"].data_ptr()) for i, w in streamer.sweep()]
            addresses.append(set(found))
        resident = {plan.layers[step] for step in of_tier(streamer, "device")}
    assert {i for i, _ in addresses[0] & addresses[1]} >= resident
    row = next(line for line in str(plan).splitlines() if "resident on the device" in line)
    assert row.endswith("  " + ", ".join(map(str, sorted(resident))))
    assert plan.document()["layers"] == plan.layers


def test_an_error_names_the_layer_by_its_index_in_the_checkpoint(
    model: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(None, model[0], layers=[5, 9], read_mode="buffered") as streamer:
        spec = streamer.manifest.layers[9].tensors["mlp.up_proj.weight"]
        disk = FailingDisk(spec.offset, errno.EIO)
        monkeypatch.setattr(os, "preadv", disk)
        disk.times = 1
        with pytest.raises(ReadError, match=r"^layer 9, tensor 'model\.layers\.9\."):
            for _ in range(2):
                streamer.run_pass(None, nothing)
        streamer.run_pass(None, nothing)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"layers=\[\]: must name at least one layer"),
        (range(0), r"layers=range\(0, 0\): must name at least one layer"),
        ([0, 20], r"layers\[1\]=20: must be an int from 0 to 19"),
        ([-1], r"layers\[0\]=-1: must be an int from 0 to 19"),
        ([0, 3, 0], r"layers\[2\]=0: is named twice"),
        ([0, True], r"layers\[1\]=True: must be an int from 0 to 19"),
        (["0"], r"layers\[0\]='0': must be an int from 0 to 19"),
        ("01", "layers='01': must be a list of layer indices"),
        (3, "layers=3: must be a list of layer indices"),
    ],
)
def test_layers_that_a_checkpoint_does_not_have_are_refused_by_name(
    model: tuple[Path, dict[str, torch.Tensor]], layers: Any, message: str
) -> None:
    for door in (LayerStreamer.from_checkpoint, plan_checkpoint):
        with pytest.raises(ConfigError, match=message):
            door(model[0], device="cpu", layers=layers)
