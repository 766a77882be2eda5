"""The script that turns GGUF files into safetensors directories, and the models it makes."""

import json
from pathlib import Path

import gguf_to_safetensors
import pytest
import torch
from assets import AGREED, GOLDEN, one_torch_thread, prompt_ids, relative_error, smollm2
from forward import open_forward
from gguf_models import write_gguf
from transformers import AutoModelForCausalLM
from zoo import reference, stepwise, zoo_model

from layer_streamer.llm.metadata import load_config, load_tokenizer

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def convert(*arguments: object) -> int:
    return gguf_to_safetensors.main([str(argument) for argument in arguments])


def write_tiny(path: Path, name: str = "llama", **changes):
    model = zoo_model(name, **changes)
    write_gguf(path, model, tokenizer=True)
    return model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-biases", {}),
        ("qwen2-yarn", {}),
        ("mistral", {}),
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("olmoe", {}),
        (
            "gemma3_text",
            {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 24},
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}},
        ),
    ],
)
def test_what_is_written_is_the_model_for_the_engine_and_for_transformers(
    cache, tmp_path, capsys, name, changes
):
    model, out = write_tiny(tmp_path / "tiny.gguf", name, **changes), tmp_path / "out"
    assert convert(tmp_path / "tiny.gguf", out, "--dtype", "float32") == 0
    assert capsys.readouterr().out == f"{out}\n"
    expected = reference(model)
    with open_forward(out, load_config(out)) as forward:
        assert relative_error(stepwise(forward), expected) <= 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert relative_error(reference(theirs), expected) <= 1e-5


def test_files_are_no_larger_than_asked_for_and_bfloat16_by_default(cache, tmp_path):
    model = write_tiny(tmp_path / "tiny.gguf")
    assert convert(tmp_path / "tiny.gguf", tmp_path / "out", "--shard-gb", "1e-4") == 0
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    config = load_config(tmp_path / "out")
    with open_forward(tmp_path / "out", config) as forward:
        assert {spec.dtype for spec in forward.streamer.manifest.static.values()} == {
            torch.bfloat16
        }
        found = stepwise(forward)
    assert relative_error(found, reference(model)) <= 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.gguf", "."], "exists"),
        (["tiny.gguf", "out", "--shard-gb", "0"], "--shard-gb 0: must be above 0"),
        (["no.gguf", "out"], "no.gguf: no such file"),
        (["tiny.gguf", "no/such/out"], "no/such"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(
    cache, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny.gguf")
    before = set(tmp_path.iterdir())
    assert convert(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}


def test_rope_factors_that_are_no_llama3_scaling_are_refused(cache, tmp_path, capsys):
    model = zoo_model("llama")
    write_gguf(tmp_path / "a.gguf", model, tokenizer=True, rope_factors=torch.full((12,), 2.0))
    assert convert(tmp_path / "a.gguf", tmp_path / "out") == 2
    assert "rope_freqs.weight is not the scaling of a LLaMA 3 model" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_from_safetensors_gives_the_golden_ids(tmp_path):
    assert convert(smollm2(), tmp_path / "out", "--dtype", "float32") == 0
    tokenizer, config = load_tokenizer(tmp_path / "out"), load_config(tmp_path / "out")
    for key in AGREED:
        expected = GOLDEN[key]["new_ids"]
        with one_torch_thread(), open_forward(tmp_path / "out", config) as forward:
            found = [int(forward(prompt_ids(tokenizer, key))[-1].argmax())]
            while len(found) < len(expected):
                found.append(int(forward(found[-1:])[-1].argmax()))
        assert found == expected, key


def test_the_config_and_the_tokenizer_are_written_too(cache, tmp_path):
    write_tiny(tmp_path / "tiny.gguf")
    assert convert(tmp_path / "tiny.gguf", tmp_path / "out", "--dtype", "float16") == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["dtype"] == "float16" and fields["bos_token_id"] == 1
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a new \u20ac")["input_ids"]) == "a new \u20ac"
