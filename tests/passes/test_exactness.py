"""What layer_fn sees equals the file, byte for byte, whatever the layers and the settings."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    SAFETENSORS_NAMES,
    odd_checkpoint,
    random_tensor,
    tiny_tensors,
    write_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import pairwise
from support import Witness, make_device, open_checkpoint, raw

SETTINGS: dict[str, list[int | None]] = {
    "n_gpu": [0, 1, 2, 5],
    "n_cpu_pinned": [None, 0, 1, 2, 5],
    "n_cpu": [None, 0, 1, 2, 5],
    "batch_gpu": [None, 1, 2, 9],
    "batch_cpu_pinned": [None, 1, 2, 9],
    "batch_cpu": [None, 1, 2, 9],
}
DEVICES = ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)]
PASSES = 3


def run_passes(kind: str, path: Path, tensors: Mapping[str, Any], **options: Any) -> None:
    device = make_device(kind)
    witness = Witness(device, tensors)
    with open_checkpoint(device, path, read_threads=3, read_chunk=4096, **options) as streamer:
        for _ in range(PASSES):
            streamer.run_pass(None, witness)
        assert witness.layers == PASSES * list(range(streamer.num_layers))
        witness.check()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("odd")
    return directory, odd_checkpoint(directory)


@pytest.mark.parametrize("kind", DEVICES)
def test_every_pair_of_settings_streams_the_files_bytes(
    odd: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    for row in pairwise(SETTINGS):
        run_passes(kind, *odd, **row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "fake"])
@pytest.mark.parametrize("n_gpu", SETTINGS["n_gpu"])
@pytest.mark.parametrize("n_cpu_pinned", SETTINGS["n_cpu_pinned"])
def test_every_combination_of_settings_streams_the_files_bytes(
    odd: tuple[Path, dict[str, torch.Tensor]], kind: str, n_gpu: int, n_cpu_pinned: int | None
) -> None:
    fixed = {"n_gpu": [n_gpu], "n_cpu_pinned": [n_cpu_pinned]}
    for values in itertools.product(*(SETTINGS | fixed).values()):
        run_passes(kind, *odd, **dict(zip(SETTINGS, values, strict=True)))


@st.composite
def layers(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    tensors = {}
    for i in range(draw(st.integers(1, 6))):
        for j in range(draw(st.integers(1, 4))):
            dtype = draw(st.sampled_from(sorted(SAFETENSORS_NAMES, key=str)))
            shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 33]), max_size=3))
            tensors[f"model.layers.{i}.w{j}"] = random_tensor(shape, dtype, seed=100 * i + j)
    return tensors


@pytest.mark.parametrize("kind", DEVICES)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=layers(),
    padding=st.integers(0, 17),
    gap=st.integers(0, 5000),
    files=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
    options=st.fixed_dictionaries({name: st.sampled_from(v) for name, v in SETTINGS.items()}),
)
def test_random_layers_at_random_offsets_are_exact(  # noqa: PLR0917
    tmp_path: Path, kind: str, tensors: Any, padding: int, gap: int, files: int, order: Any,
    options: Any,
) -> None:  # fmt: skip
    for stale in tmp_path.iterdir():
        stale.unlink()
    names = list(tensors)
    order.shuffle(names)
    for part in range(files):
        some = {name: tensors[name] for name in names[part::files]}
        if some:
            path = tmp_path / f"model-{part}.safetensors"
            write_safetensors(path, some, padding=padding, gap=gap)
    run_passes(kind, tmp_path, tensors, **options)


@pytest.mark.parametrize("kind", ["cpu", "fake"])
def test_a_slow_layer_fn_finds_its_layer_intact_after_every_pool_has_filled(
    tmp_path: Path, kind: str
) -> None:
    tensors = tiny_tensors(9, hidden=48)
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    device = make_device(kind)
    witness = Witness(device, tensors)
    options = {"n_gpu": 1, "n_cpu_pinned": 1, "n_cpu": 1}
    with open_checkpoint(device, path, **options) as streamer:
        slots = len(streamer._parts.pipeline.lanes[0].memory.slots)

        def slow(x: None, weights: Any, layer_idx: int) -> None:
            run = streamer._parts.pipeline.control.run
            while run.lanes[0].copied.done < run.handed - 1 + slots:
                os.sched_yield()
            witness(x, weights, layer_idx)

        for _ in range(PASSES):
            streamer.run_pass(None, slow)
        witness.check()


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_casts_plain_floats_and_leaves_every_other_tensor_as_stored(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    stored = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
    tensors = {
        f"model.layers.{i}.{str(source)[6:]}": torch.randn(5, 7).to(source)
        for i in range(4)
        for source in stored
    }
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    castable = stored[:3]
    wanted = {n: t.to(dtype) if t.dtype in castable else t for n, t in tensors.items()}
    device = make_device(kind)
    witness = Witness(device, wanted)
    with open_checkpoint(device, path, dtype=dtype) as streamer:
        for _ in range(PASSES):
            streamer.run_pass(None, witness)
        witness.check()


@pytest.mark.parametrize("kind", DEVICES)
def test_tail_tensors_follow_the_layers_by_rows_none_larger_than_a_layer(
    tmp_path: Path, kind: str
) -> None:
    tensors = tiny_tensors(3)
    head = random_tensor((1000, 8))
    path = write_safetensors(tmp_path / "model.safetensors", tensors | {"head": head})
    device = make_device(kind)
    with open_checkpoint(device, path, tail=["head", "model.norm.weight"]) as streamer:
        largest = max(layer.nbytes for layer in streamer.manifest.layers)
        for _ in range(PASSES):
            rows, norms = [], []
            for layer_idx, weights in streamer.sweep():
                if layer_idx < streamer.num_layers:
                    continue
                assert sum(t.nbytes for t in weights.values()) <= largest
                assert list(weights) in (["head"], ["model.norm.weight"])
                if kind == "fake":
                    device.drain()
                rows += [raw(weights["head"]).clone()] if "head" in weights else []
                norms += [raw(t).clone() for k, t in weights.items() if k != "head"]
            assert torch.equal(torch.cat(rows).cpu(), raw(head))
            assert torch.equal(torch.cat(norms).cpu(), raw(tensors["model.norm.weight"]))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("padding", [0, 1])
def test_static_and_host_tensors_hold_the_files_bytes(
    tmp_path: Path, kind: str, padding: int
) -> None:
    tensors = tiny_tensors(2) | {
        "scalar": random_tensor((), torch.float64),
        "empty": random_tensor((0, 3), torch.int16),
        "large": random_tensor((5_000_011,), torch.int32),
    }
    path = write_safetensors(tmp_path / "model.safetensors", tensors, padding=padding)
    device = make_device(kind)
    with open_checkpoint(device, path) as streamer:
        for name, tensor in tensors.items():
            static, viewed = streamer.load_static(name), streamer.host_tensor(name)
            assert static is streamer.load_static(name)
            assert static.device == streamer.device
            assert viewed.device.type == "cpu"
            for got in (static.cpu(), viewed):
                assert got.shape == tensor.shape
                assert got.dtype == tensor.dtype
                assert torch.equal(raw(got), raw(tensor)), name


def test_a_static_tensor_is_cast_like_the_layers(tmp_path: Path) -> None:
    tensors = tiny_tensors(1) | {"big": torch.randn(3_000_000)}
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    with open_checkpoint(None, path, dtype=torch.bfloat16) as streamer:
        assert torch.equal(streamer.load_static("big"), tensors["big"].to(torch.bfloat16))


def test_the_files_are_never_written_through_a_host_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors(1)
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    before = path.read_bytes()
    with open_checkpoint(None, path) as streamer:
        streamer.host_tensor("lm_head.weight").fill_(3)
    assert path.read_bytes() == before


def test_x_in_nested_containers_reaches_the_layer_and_comes_back(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", tiny_tensors(2))
    with open_checkpoint(None, path) as streamer:
        x = {"a": (torch.ones(1), [torch.zeros(2)]), "b": "text"}
        assert streamer.run_pass(x, lambda x, w, i: {**x, "n": i}) == {**x, "n": 1}


@pytest.mark.parametrize("kind", DEVICES)
def test_on_copy_is_called_once_a_layer_in_order(tmp_path: Path, kind: str) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", tiny_tensors(3))
    seen: list[int] = []
    options = {"n_gpu": 0, "n_cpu_pinned": 0, "on_copy": lambda i, stream: seen.append(i)}
    with open_checkpoint(make_device(kind), path, **options) as streamer:
        for _ in range(4):
            streamer.run_pass(None, lambda x, w, i: None)
    assert seen[:12] == [0, 1, 2] * 4
