"""What quantize.py writes of tiny models, for transformers and for the engine."""

import json

import pytest
import torch
from assets import edit_weights, relative_error
from forward import open_forward
from gguf_models import write_gguf
from packed_models import write_packed
from quantizing import contents, load, run, save, tensors, weights
from transformers import AutoTokenizer
from zoo import reference, stepwise, zoo_model

from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.quantize.shards import Entry, is_whole, write_shard
from layer_streamer.llm.weights.quantization import read_quantization
from layer_streamer.tools import cli

CASES = {
    "llama": {},
    "llama-biases": {},
    "qwen2-tied": {},
    "qwen3": {},
    "gemma3_text": {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 24},
}
"""Each with what makes it a model that a GGUF file can describe. Widths 64 and 96 take groups of
64 and 32."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


OF_BITS = [(name, bits) for name in CASES for bits in (4, 8)]
FEW = [(name, bits) for name, bits in OF_BITS if bits == 4 or name == "llama"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [pytest.param(*c, marks=[] if c in FEW else pytest.mark.slow) for c in OF_BITS],
)
def test_transformers_and_the_engine_load_what_is_written(tmp_path, capsys, name, bits):
    source, out = tmp_path / "a.gguf", tmp_path / "out"
    write_gguf(source, zoo_model(name, **CASES[name]), tokenizer=True)
    assert run(source, out, "--bits", bits, "--dtype", "float32") == 0
    assert capsys.readouterr().out == f"{out}\n"
    theirs, ours = load(out), weights(out, bits)
    found = dict(theirs.state_dict())
    for key, expected in ours.items():
        assert torch.equal(found[key].float(), expected), key
    expected = reference(theirs)
    with open_forward(out, load_config(out)) as forward:
        assert relative_error(stepwise(forward), expected) <= 1e-5


def test_a_gguf_file_and_its_safetensors_twin_give_the_same_bytes(tmp_path):
    model = zoo_model("llama-biases")
    write_gguf(tmp_path / "a.gguf", model, tokenizer=True)
    save(tmp_path / "twin", model)
    for source, out in (("a.gguf", "a"), ("twin", "b")):
        assert run(tmp_path / source, tmp_path / out, "--bits", 4, "--dtype", "float16") == 0
    found, expected = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    files = [name for name in contents(tmp_path / "a") if name.endswith(".safetensors")]
    assert len(files) == 3 + 2


def test_what_is_not_quantized_is_the_original(tmp_path):
    model = zoo_model("qwen2")
    save(tmp_path / "in", model, torch.bfloat16)
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 8) == 0
    found, state = tensors(tmp_path / "out"), model.state_dict()
    plain = {name for name in found if "weight_" not in name}
    assert {name for name in state if not name.endswith("_proj.weight")} == plain
    for name in plain:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], state[name])


def test_a_head_that_is_stored_beside_a_tied_config_is_kept(tmp_path):
    model = zoo_model("llama")
    save(tmp_path / "in", model)
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    fields |= {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 8, "--dtype", "float32") == 0
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], model.lm_head.weight)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "num_nextn_predict_layers" not in config
    theirs = load(tmp_path / "out")
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    with open_forward(tmp_path / "out", load_config(tmp_path / "out")) as forward:
        assert relative_error(stepwise(forward), reference(theirs)) <= 1e-5


def test_a_tensor_that_nothing_uses_is_refused_before_anything_is_written(tmp_path, capsys):
    save(tmp_path / "in", zoo_model("llama"))
    edit_weights(tmp_path / "in", lambda t: t.update({"lm_head.bias": torch.ones(512)}))
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 8) == 2
    assert "'lm_head.bias' is no part of a llama model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_model_in_half_precision_stays_in_it(tmp_path):
    save(tmp_path / "in", zoo_model("llama"), torch.float16)
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 4, "--group", 32) == 0
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for name, tensor in found.items() if "_scale" in name} == {torch.float16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_the_config_says_what_the_tensors_are(tmp_path):
    save(tmp_path / "in", zoo_model("llama"))
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 4) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = read_quantization(config["quantization_config"])
    found = tensors(tmp_path / "out")
    for name, scales in found.items():
        if name.endswith("weight_scale"):
            module = name.removesuffix(".weight_scale")
            rows, width = found[f"{module}.weight_shape"].tolist()
            scheme = quantization.scheme(module)
            assert (scheme.bits, scheme.symmetric) == (4, True)
            assert scales.shape == (rows, width // scheme.group)
            assert scheme.group == (64 if width % 64 == 0 else 32)
    assert quantization.scheme("lm_head") is None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_can_be_quantized_again(tmp_path, bits):
    save(tmp_path / "in", zoo_model("llama"))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(tmp_path / "in", first, "--bits", 4, "--dtype", "float32", "--group", 32) == 0
    assert run(first, second, "--bits", bits, "--dtype", "float32", "--group", 32) == 0
    found, expected = weights(second, bits), weights(first, 4)
    for name in expected:
        error = relative_error(found[name], expected[name])
        assert error <= (1e-6 if bits == 4 or "_proj" not in name else 0.01), name


@pytest.mark.parametrize("packing", ["awq-g32", "gptq4-v2-act-order", "fp8-blocks"])
def test_a_model_in_another_packed_format_can_be_quantized(tmp_path, packing):
    model = zoo_model("llama")
    write_packed(tmp_path / "in", model, packing)  # puts what the file holds into the model
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 8, "--dtype", "float32") == 0
    found = weights(tmp_path / "out", 8)
    for name, expected in model.state_dict().items():
        assert relative_error(found[name], expected) <= 0.02, name


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpu_makes_what_the_cpu_makes(tmp_path, bits):
    write_gguf(tmp_path / "a.gguf", zoo_model("llama-biases"), tokenizer=True)
    (tmp_path / "text").write_text("a boat on the sea " * 20)
    options = ("--bits", bits, "--dtype", "float32", "--calibrate", tmp_path / "text")
    options = (*options, "--text", tmp_path / "text")
    assert run(tmp_path / "a.gguf", tmp_path / "cpu", *options) == 0
    arguments = [tmp_path / "a.gguf", tmp_path / "gpu", *options, "--device", "cuda"]
    assert cli.main(["quantize", *map(str, arguments)]) == 0
    found, expected = weights(tmp_path / "gpu", bits), weights(tmp_path / "cpu", bits)
    for name in expected:  # sums in another order may tip a scale to its neighbour
        assert (found[name] - expected[name]).abs().mean() <= 0.005 * expected[name].abs().mean()


def test_tokenizer_and_template_stand_beside_the_weights(tmp_path):
    write_gguf(tmp_path / "a.gguf", zoo_model("llama"), tokenizer=True)
    assert run(tmp_path / "a.gguf", tmp_path / "out", "--bits", 4) == 0
    names = set(contents(tmp_path / "out"))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a new \u20ac")["input_ids"]) == "a new \u20ac"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_files_of_a_safetensors_model_are_copied_as_they_are(tmp_path):
    save(tmp_path / "in", zoo_model("llama"))
    texts = {"chat_template.jinja": "{{ 1 }}", "generation_config.json": '{"top_k": 3}'}
    for name, text in texts.items():
        (tmp_path / "in" / name).write_text(text)
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 4) == 0
    found = contents(tmp_path / "out")
    assert {name: found[name].decode() for name in texts} == texts


def test_a_file_that_is_cut_short_is_not_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, {"x": Entry.of(torch.arange(5))}, {})
    whole = path.read_bytes()
    assert is_whole(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not is_whole(path), length
