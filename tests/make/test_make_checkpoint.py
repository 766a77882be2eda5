"""Random checkpoints: what transformers, safetensors and the streamer find in them."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
import random_values
import torch
from fabricated import LLAMA, TIED, UNTIED, add_tiny_shapes, contents, make
from packed_models import hub_parameters
from paths import MAKE
from random_values import encode
from safetensors import safe_open
from shapes import EXPERTS, SHAPES, tensor_shapes
from shards import plan_shards, shard_index
from support import raw
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from layer_streamer import LayerStreamer

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    add_tiny_shapes(monkeypatch)


@pytest.fixture
def place(tmp_path):
    """An empty directory, for OUT."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def load(directory: Path, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_every_tensor_and_its_values_are_of_a_sane_scale(place, dtype):
    found = tensors(make(place / "out", "--dtype", dtype, "--shard-gb", 1e-4))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(
        tensor_shapes(SHAPES[UNTIED])
    )
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype)
        deviations = tensor.float() - (1.0 if name.endswith("norm.weight") else 0.0)
        assert 0.008 < deviations.std() < 0.035 and deviations.abs().max() < 0.13, name


@pytest.mark.parametrize("shape", [TIED, UNTIED, LLAMA])
def test_transformers_loads_it_without_a_key_missing_or_left_over(place, shape):
    model = load(make(place / "out", "--layers", 2, shape=shape))
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    with torch.no_grad():
        logits = model(torch.tensor([[3, 1, 4, 1, 5]])).logits
    assert logits.isfinite().all() and logits.std() > 0.01


@pytest.mark.parametrize("shard_nbytes", [10**9, 300_000, 100_000, 50_000, 20_000, 100])
@pytest.mark.parametrize("shape", [TIED, UNTIED])
def test_the_files_are_byte_for_byte_those_that_transformers_saves(place, shape, shard_nbytes):
    made = make(place / "made", "--shard-gb", shard_nbytes / 1e9, shape=shape)
    model = AutoModelForCausalLM.from_config(make_config(shape), dtype=torch.bfloat16)
    model.load_state_dict(tensors(made), strict=False)
    model.save_pretrained(place / "saved", max_shard_size=shard_nbytes)
    found, expected = contents(made), contents(place / "saved")
    for name in ("config.json", "generation_config.json"):
        expected.pop(name)
    found.pop("config.json")
    assert list(found) == list(expected)
    assert found == expected


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_names_the_tensors_of_transformers_model(shape):
    config = make_config(shape)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    expected = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    found = list(tensor_shapes(SHAPES[shape]))
    if SHAPES[shape]["model_type"] in EXPERTS:  # whose order is that of names of other parameters
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        expected = sorted((name, tuple(part.shape)) for name, part in hub_parameters(model))
        found.sort()
    assert found == expected


def make_config(shape: str):
    kinds = {
        "qwen2": Qwen2Config, "llama": LlamaConfig, "mixtral": MixtralConfig,
        "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig, "olmoe": OlmoeConfig,
        "gpt_oss": GptOssConfig,
    }  # fmt: skip
    return kinds[SHAPES[shape]["model_type"]].from_dict(dict(SHAPES[shape]))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_transformers_keeps_every_field_of_every_config(shape):
    fields = dict(SHAPES[shape])
    known = type(make_config(shape))().to_dict() | {"architectures": None}
    found = make_config(shape).to_dict()
    assert found["rope_parameters"]["rope_theta"] == fields.pop("rope_theta")
    scaling = fields.pop("rope_scaling", None) or {"rope_type": "default"}
    assert scaling.items() <= found["rope_parameters"].items()
    if not fields.get("use_sliding_window"):
        fields.pop("sliding_window", None)  # transformers drops what is not used
    fields.pop("rope_interleaved", None)  # of SmolLM2's published config; transformers ignores it
    if "num_experts" in fields:  # under another of its names, in one of the types
        found.setdefault("num_experts", found.get("num_local_experts"))
    assert set(fields) <= {*known, "head_dim", "num_experts"}
    assert {name: found[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("shape", "total_size"),
    [
        ("smollm2-135m", 269_030_016),
        ("qwen2.5-0.5b", 988_065_536),
        ("qwen2.5-7b", 15_231_233_024),
        ("olmoe", 13_838_323_712),
        ("llama3-8b", 16_060_522_496),
        ("qwen3-30b-a3b", 61_064_245_248),
        ("qwen2.5-32b", 65_527_752_704),
        ("mixtral-8x7b", 93_405_585_408),
        ("llama3-70b", 141_107_412_992),
        ("qwen2.5-72b", 145_412_407_296),
    ],
)
def test_the_bytes_are_those_of_the_published_checkpoint(shape, total_size):
    shapes = dict(tensor_shapes(SHAPES[shape]))
    shards = plan_shards(shapes, dtype="bfloat16", shard_nbytes=5e9)
    assert shard_index(shards)["metadata"]["total_size"] == total_size
    assert sum(shard.nbytes - len(shard.header) for shard in shards) == total_size
    assert sorted(name for shard in shards for name in shard.counts) == sorted(shapes)
    assert all(shard.nbytes - len(shard.header) <= 5e9 for shard in shards)


def test_the_streamer_opens_it_and_streams_the_layers(place):
    out = make(place / "out", "--layers", 4, "--shard-gb", 1e-4)
    expected = tensors(out)
    with LayerStreamer.from_checkpoint(out, device="cpu") as streamer:
        assert streamer.num_layers == 4
        for layer_idx, weights in streamer.sweep():
            for name, tensor in weights.items():
                whole = expected[f"model.layers.{layer_idx}.{name}"]
                assert torch.equal(raw(tensor), raw(whole))


def test_a_seed_repeats_every_byte_and_another_seed_gives_other_tensors(place):
    first, again = (make(place / name, "--seed", 7) for name in "ab")
    assert contents(first) == contents(again)
    other = tensors(make(place / "c", "--seed", 8))
    for name, tensor in tensors(first).items():
        assert (raw(tensor) != raw(other[name])).float().mean() > 0.3, name


def test_no_two_tensors_are_alike(place):
    found = tensors(make(place / "out"))
    starts = {bytes(raw(tensor)[:64].numpy()) for tensor in found.values()}
    assert len(starts) == len(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_gb", [5, 0.004, 0.0003])
def test_no_block_of_any_file_repeats_another(place, monkeypatch, dtype, shard_gb):
    # A pool of as many values as there are blocks is walked round thousands of times.
    monkeypatch.setattr(random_values, "MIN_POOL_ELEMENTS", 1)
    monkeypatch.setitem(SHAPES, UNTIED, SHAPES[UNTIED] | {"vocab_size": 24_000})
    files = contents(make(place / "out", "--dtype", dtype, "--shard-gb", shard_gb))
    blocks = [
        data[at : at + 4096]
        for name, data in files.items()
        if name.endswith(".safetensors")
        for at in range(0, len(data), 4096)
    ]
    assert len(blocks) > 1500
    assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_encoded_as_torch_rounds_them(dtype):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[::2] &= 0xFFFF8000  # half of these lie in the middle between two values of bfloat16
    values = bits.view(np.float32)
    values = values[np.abs(values) < 60_000]
    expected = raw(torch.from_numpy(values.copy()).to(getattr(torch, dtype)))
    assert encode(values, dtype).tobytes() == expected.numpy().tobytes()


def test_writes_that_the_system_cuts_short_are_completed(place, monkeypatch):
    whole = make(place / "whole")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:10_007], at))
    assert contents(make(place / "short")) == contents(whole)


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(place, monkeypatch):
    unsynced: dict[int, int] = {}
    most, pwrite, fdatasync = [0], os.pwrite, os.fdatasync

    def write(file, data, at):
        unsynced[file] = unsynced.get(file, 0) + len(data)
        most.append(unsynced[file])
        return pwrite(file, data, at)

    def sync(file):
        fdatasync(file)
        unsynced[file] = 0

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(make_checkpoint, "SYNC_NBYTES", 100_000)
    make(place / "out")
    assert set(unsynced.values()) == {0}
    assert 100_000 <= max(most) < 100_000 + 64_000  # a tensor has at most 64 kB


def test_the_path_is_all_of_stdout_and_the_last_line_of_stderr_has_the_totals(place, capsys):
    out = make(place / "out", "--shard-gb", 1e-4)
    written, err = capsys.readouterr()
    assert written == f"{out}\n"
    files = len(list(out.glob("*.safetensors")))
    assert re.fullmatch(rf"0\.00 GB in {files} files, \d+\.\d s: \d+\.\d\d GB/s\n", err)


def test_a_terminal_sees_a_progress_bar_in_bytes(place, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    make(place / "out")
    assert re.search(r"\r  0%.*/39\dk .*B/s", terminal.getvalue())


def test_the_script_runs_by_itself_without_importing_torch(place):
    script = [sys.executable, "-X", "importtime", str(MAKE / "make_checkpoint.py")]
    command = [*script, "out", "--shape", "smollm2-135m", "--layers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place)
    assert result.stdout == "out\n"
    assert " torch" not in result.stderr
    assert len(tensors(place / "out")) == 1 + 9 + 1


def test_the_directory_is_as_readable_as_any_that_the_user_makes(place):
    (place / "usual").mkdir()
    assert make(place / "out").stat().st_mode == (place / "usual").stat().st_mode
