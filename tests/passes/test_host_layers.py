"""Layers that are handed out in host memory, while the others stream to the device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from fake_device import FakeDevice
from routes import (
    NUM_LAYERS,
    Boom,
    assert_next_pass_is_exact,
    nothing,
    nothing_left,
    open_route,
    raises_at,
    route_params,
)
from support import Witness, make_device, open_checkpoint

from layer_streamer import (
    CheckpointChangedError,
    ConfigError,
    LayerStreamer,
    ReadError,
    StreamerError,
    plan_checkpoint,
)
from layer_streamer.transport.mapped import MappedFiles

on_both = pytest.mark.parametrize(
    "route", route_params("host views", "host images", "cuda host views", "cuda host images")
)
VIEWS: Mapping[str, Any] = {"n_gpu": 1, "read_mode": "mapped"}
IMAGES: Mapping[str, Any] = {"n_gpu": 1, "read_mode": "buffered"}


@on_both
def test_of_passes_that_want_it_or_not_each_sees_the_files_bytes(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    for on_host in (True, False, False, True, True, False):
        witness = Witness(device, tensors)
        streamer.run_pass(None, witness, on_host=on_host)
        witness.check()
        assert witness.layers == list(range(NUM_LAYERS))


@on_both
def test_what_the_host_computes_is_copied_in_the_passes_alone_that_stream_it(
    streamer: LayerStreamer,
) -> None:
    there, copied = set(streamer.plan.host_layers), list[set[int]]()
    assert there == {1, 4}
    for on_host in (True, False, True):
        streamer.run_pass(None, nothing, on_host=on_host)
        report = streamer.last_pass
        assert report is not None
        copied.append({span.layer_idx for span in report.steps["copy"].spans})
        assert ("host" in report.steps) == on_host
        if on_host:
            nbytes = sum(streamer.manifest.layers[i].nbytes for i in there)
            assert report.steps["host"].bytes == nbytes
            assert {span.layer_idx for span in report.steps["host"].spans} == there
            assert "host" in str(report) and "host" in str(report.timeline())
    assert copied == [set(range(NUM_LAYERS)) - there, set(range(NUM_LAYERS)), copied[0]]


@on_both
def test_the_host_is_handed_one_and_the_same_memory_in_every_pass(streamer: LayerStreamer) -> None:
    addresses = []
    for on_host in (True, False, True):
        of_pass = {i: w["self_attn.q_proj.weight"].data_ptr() for i, w in streamer.sweep(
            on_host=on_host)}  # fmt: skip
        addresses.append([of_pass[i] for i in (1, 4)])
    assert addresses[0] == addresses[2] != addresses[1]


@on_both
@pytest.mark.parametrize("layer_idx", [0, 1, 4])
def test_what_a_function_raises_between_host_and_device_leaves_the_next_pass_exact(
    streamer: LayerStreamer, device: Any, tensors: Any, layer_idx: int
) -> None:
    for on_host in (True, False, True):
        with pytest.raises(Boom):
            streamer.run_pass(None, raises_at(layer_idx), on_host=on_host)
        assert_next_pass_is_exact(streamer, device, tensors)


@on_both
def test_a_write_to_a_layer_of_the_host_reaches_no_pass_that_streams_it(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    def writes(x: Any, weights: Any, i: int) -> Any:
        if i == 4:
            weights["self_attn.q_proj.weight"].zero_()
        return x

    for on_host in (False, True):
        with pytest.raises(StreamerError, match=r"layer 4: .* written"):
            streamer.run_pass(None, writes)
        witness = Witness(device, tensors)
        streamer.run_pass(None, witness, on_host=on_host)
        streamer.run_pass(None, witness)
        witness.check()


@on_both
def test_a_write_after_the_pass_is_an_error_or_undone_before_anything_is_copied(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    def write_later() -> None:
        kept = {i: weights["self_attn.q_proj.weight"] for i, weights in streamer.sweep()}
        kept[1].zero_()

    write_later()
    with pytest.raises(StreamerError, match=r"layer 1: .* written"):
        streamer.run_pass(None, nothing)
    write_later()
    witness = Witness(device, tensors)
    for on_host in (False, True):
        streamer.run_pass(None, witness, on_host=on_host)
    witness.check()


def test_a_layer_that_cannot_be_restored_fails_each_pass_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, device = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40), FakeDevice(1)

    def refuse() -> None:
        raise ReadError("the disk is gone")

    def write(x: Any, weights: Any, i: int) -> Any:
        return weights["mlp.up_proj.weight"].zero_() if i == 1 else x

    with open_checkpoint(device, tmp_path, host_layers=[1], **VIEWS) as streamer:
        with monkeypatch.context() as patch:
            patch.setitem(streamer._parts.pipeline.residents.reload, 1, refuse)
            with pytest.raises(StreamerError):
                streamer.run_pass(None, write)
            for on_host in (False, True, False):
                with pytest.raises(ReadError, match="the disk is gone"):
                    streamer.run_pass(None, nothing, on_host=on_host)
        assert_next_pass_is_exact(streamer, device, tensors)


def test_a_file_that_shrinks_ends_the_pass_at_the_layer_that_the_host_would_look_at(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    seen = list[int]()

    def cut(x: Any, weights: Any, i: int) -> None:
        seen.append(i)
        if i == 2:
            os.truncate(tmp_path / "model.safetensors", 3000)

    # All of them: what the fake device copies with the CPU would be killed by the missing pages.
    options = {**VIEWS, "host_layers": NUM_LAYERS}
    with (
        open_checkpoint(FakeDevice(1, eager=0.0), tmp_path, **options) as streamer,
        pytest.raises(CheckpointChangedError, match=r"model\.safetensors"),
    ):
        streamer.run_pass(None, cut)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("options", [VIEWS, IMAGES], ids=["views", "images"])
def test_all_layers_may_be_the_hosts(tmp_path: Path, options: Mapping[str, Any]) -> None:
    tensors, device = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40), FakeDevice(5)
    with (
        nothing_left(device),
        open_checkpoint(device, tmp_path, host_layers=NUM_LAYERS, **options) as streamer,
    ):
        for on_host in (True, True, False, True, False):
            witness = Witness(device, tensors)
            streamer.run_pass(None, witness, on_host=on_host)
            witness.check()


@pytest.mark.parametrize("options", [VIEWS, IMAGES], ids=["views", "images"])
def test_casts_of_the_host_are_those_of_the_device(
    tmp_path: Path, options: Mapping[str, Any]
) -> None:
    tensors, device = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40), FakeDevice(5)
    cast = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    options = {**options, "host_layers": 3, "dtype": torch.bfloat16}
    with open_checkpoint(device, tmp_path, **options) as streamer:
        placement, memory = streamer.plan.placement, streamer.memory
        assert options["read_mode"] == "mapped" or memory.host_bytes == placement.host_bytes
        for on_host in (True, False, True):
            witness = Witness(device, cast)
            witness.there = streamer.plan.host_layers if on_host else ()
            streamer.run_pass(None, witness, on_host=on_host)
            witness.check()
        with pytest.raises(StreamerError, match=r"layer 1: .* written"):
            streamer.run_pass(None, lambda x, w, i: i == 1 and w["mlp.up_proj.weight"].zero_())


def test_layers_that_lie_misaligned_in_their_file_are_handed_out_all_the_same(
    tmp_path: Path,
) -> None:
    tensors, device = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40, padding=1), FakeDevice(5)
    with open_checkpoint(device, tmp_path, host_layers=3, **VIEWS) as streamer:
        for on_host in (True, False, True):
            witness = Witness(device, tensors)
            streamer.run_pass(None, witness, on_host=on_host)
            witness.check()


def test_where_mapping_is_refused_the_layers_lie_in_memory_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, device = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40), FakeDevice(5)
    monkeypatch.setattr(MappedFiles, "pin", lambda mapped, device: False)
    with open_checkpoint(device, tmp_path, host_layers=3, **VIEWS) as streamer:
        assert streamer.plan.read_mode == "buffered"
        for on_host in (True, False):
            witness = Witness(device, tensors)
            streamer.run_pass(None, witness, on_host=on_host)
            witness.check()


def test_a_number_is_spread_and_what_else_stays_on_the_device_lies_between(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 12, hidden=40)
    free = plan_checkpoint(tmp_path, device="cpu", n_gpu=1)
    with open_checkpoint(FakeDevice(1), tmp_path, host_layers=4, **VIEWS) as streamer:
        plan = streamer.plan
        assert plan.host_layers == (1, 4, 7, 10)
        assert "of these, computed there" in str(plan)
        assert plan.document()["host_layers"] == (1, 4, 7, 10)
        room = sum(plan.placement.device_bytes) + 4 * max(s.device_nbytes for s in plan.sizes)
    with open_checkpoint(
        FakeDevice(1), tmp_path, host_layers=4, device_budget=room, **VIEWS
    ) as streamer:
        resident = [i for i, tier in enumerate(streamer.plan.tiers) if tier == "device"]
        assert len(resident) == 4 and not set(resident) & {1, 4, 7, 10}
    assert free.host_layers == ()


def test_a_budget_for_all_layers_leaves_the_hosts_where_they_are(tmp_path: Path) -> None:
    tensors, device = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40), FakeDevice(5)
    options = {**VIEWS, "host_layers": {2}, "device_budget": "1GiB"}
    with open_checkpoint(device, tmp_path, **options) as streamer:
        assert streamer.plan.tiers == ("device", "device", "host", "device", "device", "device")
        for on_host in (True, False, True):
            witness = Witness(device, tensors)
            streamer.run_pass(None, witness, on_host=on_host)
            witness.check()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (7, "host_layers=7: a pass has 6 layers"),
        ([6], "host_layers: layer 6 is not in the pass"),
        ([-1], "host_layers: layer -1 is not in the pass"),
        (-1, "host_layers=-1: must be from 0"),
        (True, "host_layers=True: must be an int"),
        ("all", "host_layers='all': must be a number of layers, or their indices"),
        ([0.5], r"host_layers: 0\.5 is no index of a layer"),
    ],
)
def test_layers_that_cannot_be_the_hosts_are_refused(tmp_path: Path, asked: Any, said: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(FakeDevice(1), tmp_path, host_layers=asked)


def test_a_host_budget_that_is_too_small_for_them_says_what_they_take(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    with pytest.raises(ConfigError, match=r"host_budget=4096 .*: 2 host_layers take [0-9]+ bytes"):
        open_checkpoint(
            FakeDevice(1), tmp_path, host_layers=2, host_budget=4096, read_mode="direct"
        )


def test_on_a_cpu_they_are_layers_like_any_other(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    with open_checkpoint(None, tmp_path, host_layers=3, n_gpu=1) as streamer:
        witness = Witness(None, tensors)
        streamer.run_pass(None, witness)
        assert streamer.plan.host_layers == ()
        report = streamer.last_pass
    witness.check()
    assert report is not None and "host" not in report.steps


@pytest.mark.gpu
@pytest.mark.parametrize("options", [VIEWS, IMAGES], ids=["views", "images"])
def test_on_a_gpu_the_layers_input_goes_to_the_host_and_back(
    tmp_path: Path, options: Mapping[str, Any]
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    places = list[tuple[int, str, str]]()

    def layer_fn(x: Any, weights: Any, i: int) -> Any:
        weight = weights["self_attn.q_proj.weight"]
        places.append((i, x["x"].device.type, weight.device.type))
        return {"x": x["x"] @ weight.to(x["x"].dtype).T}

    x = torch.randn(2, 40, device="cuda", dtype=torch.float32) * 0.1
    device = make_device("cuda")
    with open_checkpoint(device, tmp_path, host_layers=[1, 4], **options) as streamer:
        there = streamer.run_pass({"x": x}, layer_fn)["x"]
        for i, *both in places:
            assert both == ["cpu", "cpu"] if i in (1, 4) else ["cuda", "cuda"]
        here = streamer.run_pass({"x": x}, layer_fn, on_host=False)["x"]
    assert there.device.type == "cuda"
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_a_streamer_opened_again_with_and_without_them_leaves_nothing(
    tmp_path: Path, tensors: Any
) -> None:
    for route in ("host views", "host images", "mapped", "pools"):
        device = make_device("fake")
        with nothing_left(device), open_route(route, tmp_path, device) as streamer:
            streamer.run_pass(None, nothing)
