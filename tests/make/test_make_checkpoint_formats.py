"""Random checkpoints with packed matrices: what the engine and other readers find in them."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import random_packed
import torch
from assets import relative_error
from fabricated import LLAMA, TIED, TINY, UNTIED, add_tiny_shapes, contents, main, make
from paths import MAKE
from random_packed import code_scale, fp8_numbers
from shapes import SHAPES
from transformers import AutoModelForCausalLM
from zoo import reference

from layer_streamer import read_manifest
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.metadata import load_config, load_tokenizer, metadata_directory
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.weights.packed import unpack_rows

FORMATS = ["q4_k", "q8_0", "ct4", "ct8", "fp8"]
IDS = [3, 141, 59, 26, 5, 35]


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch, tmp_path):
    add_tiny_shapes(monkeypatch)
    monkeypatch.setitem(SHAPES, "whole", SHAPES[LLAMA] | {"hidden_size": 256})
    monkeypatch.setattr(random_packed, "MIN_POOL_NBYTES", 1 << 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def name_of(kind: str) -> str:
    return "out.gguf" if kind.startswith("q") else "out"


def open_made(path, **options):
    return StreamingEngine(path, device="cpu", max_length=32, **options)


def logits(path, dtype=torch.float32) -> torch.Tensor:
    with open_made(path, dtype=dtype) as engine:
        row = engine._runner.kv.rows.add(32)
        return engine._runner.forward([(row, torch.tensor(IDS))], every_position=True)


@pytest.mark.parametrize("shape", [TIED, UNTIED, LLAMA])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_forward_pass_is_finite_and_not_dead(tmp_path, kind, shape):
    out = make(tmp_path / name_of(kind), "--format", kind, shape=shape)
    for dtype in (torch.float32, torch.bfloat16):
        found = logits(out, dtype)
        assert found.isfinite().all() and 0.02 < found.std() < 10


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_are_of_the_scale_of_plain_ones(tmp_path, kind):
    out = make(tmp_path / name_of(kind), "--format", kind, shape="whole")
    with open_made(out) as engine:
        names, layers = engine.model.names, engine.streamer.manifest.layers
        for layer_idx, tensors in engine.streamer.sweep():
            if layer_idx >= len(layers):
                break
            for matrix in names.layers[layer_idx].values():
                packed = matrix.packed(tensors)
                weights = torch.empty(matrix.rows, matrix.width)
                unpack_rows(packed, 0, matrix.rows, weights)
                assert 0.014 < weights.std() < 0.026
                assert weights.mean().abs() < 0.003


@pytest.mark.parametrize("kind", ["ct4", "ct8"])
def test_transformers_loads_it_and_computes_the_same(tmp_path, kind):
    out = make(tmp_path / "out", "--format", kind, "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert relative_error(logits(out), reference(model, IDS, len(IDS))) <= 1e-4


def test_transformers_dequantizes_the_same_from_fp8(tmp_path):
    from transformers import FineGrainedFP8Config

    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_key_value_heads": 4}
    SHAPES[LLAMA] = SHAPES[LLAMA] | sizes  # transformers takes whole blocks only
    out = make(tmp_path / "out", "--format", "fp8", "--dtype", "float32", shape=LLAMA)
    config = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=config
    )
    assert relative_error(logits(out), reference(model, IDS, len(IDS))) <= 1e-4


@pytest.mark.parametrize(("kind", "shape", "expected"), [
    ("q4_k", "whole", {"Q4_K", "Q5_0", "F32"}), ("q4_k", UNTIED, {"Q5_0", "F32"}),
    ("q8_0", "whole", {"Q8_0", "F32"}),
])  # fmt: skip
def test_a_gguf_file_has_the_types_that_it_is_named_after(tmp_path, kind, shape, expected):
    out = make(tmp_path / "out.gguf", "--format", kind, shape=shape)
    reader = gguf.GGUFReader(out)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == expected
    for tensor in reader.tensors:
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()
    manifest = read_manifest(out)
    assert len(manifest.layers) == TINY["num_hidden_layers"]


def test_a_gguf_file_takes_any_text(tmp_path):
    out = make(tmp_path / "out.gguf", "--format", "q8_0")
    tokenizer = load_tokenizer(metadata_directory(read_manifest(out), print))
    text = "Grüße, 世界!\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with open_made(out) as engine:
        assert engine.generate(text, max_new_tokens=3, return_details=True).prompt_tokens > 10


@pytest.mark.parametrize("kind", FORMATS)
def test_a_seed_repeats_every_byte_and_another_gives_others(tmp_path, kind):
    def made(folder, seed):
        (tmp_path / folder).mkdir()
        out = make(tmp_path / folder / name_of(kind), "--format", kind, "--seed", seed)
        return contents(out if out.is_dir() else out.parent)

    first, again, other = made("a", 7), made("b", 7), made("c", 8)
    assert first == again
    assert first != other and list(first) == list(other)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_two_packed_tensors_begin_alike(tmp_path, kind):
    out = make(tmp_path / name_of(kind), "--format", kind, shape="whole")
    manifest = read_manifest(out)
    starts = []
    for layer, matrices in zip(
        manifest.layers, weight_names(manifest, config_of(out)).layers, strict=True
    ):
        for matrix in matrices.values():
            spec = layer.tensors[matrix.key]
            with open(spec.path, "rb") as file:
                file.seek(spec.offset)
                starts.append(file.read(64))
    assert len(set(starts)) == len(starts)


def config_of(out):
    return load_config(metadata_directory(read_manifest(out), print))


def test_bf16_is_what_is_written_without_a_format(tmp_path):
    plain, named = make(tmp_path / "a"), make(tmp_path / "b", "--format", "bf16")
    assert contents(plain) == contents(named)


def test_shards_of_packed_tensors_hold_what_the_index_says(tmp_path):
    out = make(tmp_path / "out", "--format", "ct4", "--shard-gb", 5e-5)
    assert len(list(out.glob("*.safetensors"))) > 2
    whole = make(tmp_path / "whole", "--format", "ct4")
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (whole / "config.json").read_text()
    )
    assert logits(out).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.gguf", "--format", "q8_0", "--dtype", "float16"], "--dtype: not with --format q8_0"),
        (["out.gguf", "--format", "q4_k", "--shard-gb", 1], "--shard-gb: not with --format q4_k"),
        (["out", "--format", "q8_0"], "out: with --format q8_0, it must end in .gguf"),
        (["out", "--format", "bf16", "--dtype", "float16"], "--dtype float16: not with --format"),
        (["out", "--format", "q3_k"], "invalid choice: 'q3_k'"),
        (["out", "--format", "ct4", "--shape", "odd"], "no group of 128, 64, 32 divides [48"),
        (["out.gguf", "--format", "q8_0", "--shape", "odd"], "no block of it divides 48 columns"),
    ],
)  # fmt: skip
def test_a_format_that_makes_no_sense_is_one_line(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setitem(SHAPES, "odd", SHAPES[UNTIED] | {"hidden_size": 48})
    monkeypatch.chdir(tmp_path)
    shape = [] if "--shape" in arguments else ["--shape", UNTIED]
    assert main(*arguments, *shape) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_force_replaces_a_file_of_this_script_and_no_other(tmp_path, capsys):
    out = make(tmp_path / "out.gguf", "--format", "q8_0")
    before = out.read_bytes()
    options = ("--shape", UNTIED, "--format", "q8_0", "--seed", 1)
    assert main(out, *options) == 2
    assert "exists" in capsys.readouterr().err and out.read_bytes() == before
    make(out, "--format", "q8_0", "--seed", 1, "--force")
    assert out.read_bytes() != before
    out.write_bytes(before.replace(b"random_values", b"random_valued"))
    assert main(out, *options, "--force") == 2
    assert "did not write it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["q4_k", "fp8"])
def test_the_script_needs_no_torch_for_any_format(tmp_path, kind):
    script = [sys.executable, "-X", "importtime", str(MAKE / "make_checkpoint.py")]
    options = ["--shape", "smollm2-135m", "--layers", "1", "--format", kind]
    command = [*script, name_of(kind), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert " torch" not in result.stderr


def test_random_numbers_of_eight_bits_are_those_of_torch():
    bits = np.arange(256, dtype=np.uint8)
    bits = bits[bits & 127 != 127]
    expected = torch.from_numpy(bits).view(torch.float8_e4m3fn).double()
    assert np.array_equal(fp8_numbers(), expected.numpy())
    assert 0 < code_scale("fp8") < code_scale("ct8") < code_scale("ct4")
