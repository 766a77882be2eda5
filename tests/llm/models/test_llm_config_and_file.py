"""Where config.json and the tensors say something of one matter: the one that transformers follows
is followed, and a note says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import edit_weights, relative_error, tiny_checkpoint
from gguf_models import file_config, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import write_packed
from packings import PACKINGS
from transformers import AutoModelForCausalLM
from zoo import reference, zoo_model

from layer_streamer import Manifest, read_manifest
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.opening import Model

IDS = list(range(3, 60, 2))


def rewrite(path: Path, **changes: Any) -> Path:
    """Change fields of a config.json."""
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | changes))
    return path


def theirs(path: Path) -> torch.Tensor:
    """The logits of what transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return reference(model, IDS, len(IDS))


def ours(path: Path) -> tuple[torch.Tensor, list[str]]:
    """The engine's logits, and its notes."""
    notes: list[str] = []
    options = {"device": "cpu", "dtype": torch.float32, "max_length": 64}
    with StreamingEngine(path, notify=notes.append, **options) as engine:
        runner = engine._runner
        row = runner.kv.rows.add(64)
        return runner.forward([(row, torch.tensor(IDS))], every_position=True), notes


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text-untied"])
def test_a_head_that_is_stored_is_used_though_the_config_ties_it(tmp_path, name):
    model = zoo_model(name)
    path = rewrite(tiny_checkpoint(tmp_path, model), tie_word_embeddings=True)
    found, notes = ours(path)
    assert relative_error(found, theirs(path)) <= 1e-5
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5
    assert len(notes) == 1 and "'lm_head.weight' is stored with other values" in notes[0]


def test_a_head_that_is_stored_with_the_values_of_the_embedding_is_the_embedding(tmp_path):
    path = tiny_checkpoint(tmp_path, zoo_model("llama-tied"))
    edit_weights(
        path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = Model.read(path, pytest.fail)
    assert model.names.head == model.names.embedding

    def spoil(tensors):
        tensors["lm_head.weight"].view(-1)[-1] += 1e-3

    edit_weights(path, spoil)
    found, notes = ours(path)
    assert relative_error(found, theirs(path)) <= 1e-5 and len(notes) == 1


def test_a_head_that_is_alone_is_the_embedding_of_a_tied_model(tmp_path):
    path = tiny_checkpoint(tmp_path, zoo_model("qwen2-tied"))
    edit_weights(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    found, notes = ours(path)
    assert relative_error(found, theirs(path)) <= 1e-5 and notes == []


def test_layers_beyond_those_of_the_config_are_left_out_with_a_note(tmp_path):
    path = rewrite(tiny_checkpoint(tmp_path, zoo_model("llama")), num_hidden_layers=2)
    found, notes = ours(path)
    assert relative_error(found, theirs(path)) <= 1e-5
    assert len(notes) == 1 and "'model.layers.2.input_layernorm.weight' on are left out" in notes[0]


def test_a_layer_that_guesses_further_tokens_is_left_out(tmp_path):
    path = rewrite(tiny_checkpoint(tmp_path, zoo_model("llama")), num_hidden_layers=2)
    more = {"enorm.weight": torch.ones(64), "eh_proj.weight": torch.ones(64, 128)}
    edit_weights(path, lambda t: t.update({f"model.layers.2.{k}": v for k, v in more.items()}))
    found, notes = ours(path)
    assert relative_error(found, theirs(path)) <= 1e-5 and notes == []


@pytest.mark.parametrize(
    ("packing", "change"),
    [
        ("gptq4-v2-act-order", {"desc_act": False}),
        ("gptq8-act-order", {"desc_act": False}),
        ("ct4-act-order", None),
    ],
)
def test_columns_that_are_out_of_order_are_followed_whatever_the_config_says(
    tmp_path, packing, change
):
    model = zoo_model("llama")
    config = json.loads(json.dumps(PACKINGS[packing].config))
    if change is None:
        del config["config_groups"]["g"]["weights"]["actorder"]
    write_packed(tmp_path, model, packing, config | (change or {}))
    rewrite(tmp_path, quantization_config=config | (change or {}))
    found, notes = ours(tmp_path)
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5
    assert len(notes) == 1 and "(and 20 more) is out of order" in notes[0]


def test_columns_whose_groups_were_never_set_are_in_order(tmp_path):
    model = zoo_model("llama")
    path = write_packed(tmp_path, model, "ct4-asym-g16")
    key = "model.layers.1.mlp.up_proj.weight_g_idx"
    edit_weights(path, lambda t: t.update({key: torch.full((64,), -1, dtype=torch.int32)}))
    found, notes = ours(path)
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5 and notes == []


def test_columns_out_of_order_where_they_cannot_be_followed_are_refused(tmp_path):
    path = write_packed(tmp_path, zoo_model("llama"), "int8-asym-g32")
    key = "model.layers.1.mlp.up_proj.weight_g_idx"
    edit_weights(path, lambda t: t.update({key: torch.arange(64).int() % 2}))
    with pytest.raises(UnsupportedModelError, match=f"{key}' is out of order, which is supported"):
        Model.read(path, pytest.fail)


def test_columns_in_their_order_take_no_part_whatever_the_config_says(tmp_path):
    model = zoo_model("llama")
    write_packed(tmp_path, model, "gptq4-g32")
    rewrite(tmp_path, quantization_config=PACKINGS["gptq4-g32"].config | {"desc_act": True})
    read = Model.read(tmp_path, pytest.fail)
    assert all(matrix.ordered for layer in read.names.layers for matrix in layer.values())
    assert relative_error(ours(tmp_path)[0], reference(model, IDS, len(IDS))) <= 1e-5


@pytest.mark.parametrize("name", ["ct4-g32", "ct8-channel", "int8-channel", "fp8-ct-channel"])
def test_zero_points_beside_symmetric_weights_are_looked_at(tmp_path, name):
    path = write_packed(tmp_path, zoo_model("llama"), name)
    key = "model.layers.1.mlp.up_proj.weight_zero_point"
    packed = {"ct4-g32": (12, 2, 0x88888888), "ct8-channel": (24, 1, 0x80808080)}.get(name)
    right = [torch.zeros(96, 1, dtype=torch.int8)]
    if packed is not None:
        rows, groups, word = packed
        right.append(torch.full((rows, groups), word - (1 << 32), dtype=torch.int32))
    for zeros in right:
        edit_weights(path, lambda tensors, zeros=zeros: tensors.update({key: zeros}))
        Model.read(path, pytest.fail)
        zeros.view(-1)[-1] += 1
        edit_weights(path, lambda tensors, zeros=zeros: tensors.update({key: zeros}))
        with pytest.raises(UnsupportedModelError, match=f"{key}' is not of symmetric weights"):
            Model.read(path, pytest.fail)


def test_an_adapter_beside_the_model_is_not_used_and_a_note_says_so(tmp_path):
    path = tiny_checkpoint(tmp_path, zoo_model("llama"))
    (path / "adapter_config.json").write_text("{}")
    notes: list[str] = []
    Model.read(path, notes.append)
    assert len(notes) == 1 and "unless adapter= (--adapter) names its folder" in notes[0]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("llama", {"sliding_window": 9}, "sliding_window=9 is not used"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types is not used"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
    ],
)
def test_a_window_that_a_model_type_does_not_have_is_named(tmp_path, name, fields, said):
    model = zoo_model(name)
    path = rewrite(tiny_checkpoint(tmp_path, model), **fields)
    found, notes = ours(path)
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5
    assert len(notes) == 1 and said in notes[0]


@pytest.mark.parametrize("name", ["v.blk.0.ln1.weight", "mm.input_projection.weight"])
def test_a_gguf_file_with_an_encoder_of_images_runs_its_text_part(tmp_path, name):
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("llama"))
    names = weight_names(with_tensor(path, name), file_config(path))
    assert f"other parts ({name.partition('.')[0]}) are not used" in names.notes[0]


@pytest.mark.parametrize(
    "name", ["rope_factors_long.weight", "output.bias", "token_types.weight", "cls.weight"]
)
def test_a_tensor_of_a_gguf_file_that_nothing_uses_is_refused_by_name(tmp_path, name):
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("llama"))
    with pytest.raises(UnsupportedModelError, match=f"'{name}' is no part of a llama"):
        weight_names(with_tensor(path, name), file_config(path))


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("attn_rot_embd.weight", False),
        ("attn_q.scale", True),
        ("attn_q.input_scale", False),
        ("attn_sinks.weight", True),
        ("attn_output.bias", True),
        ("ffn_gate_inp.weight", True),
        ("nextn.eh_proj.weight", True),
    ],
)
def test_a_tensor_of_a_gguf_layer_that_nothing_uses_is_refused_by_name(tmp_path, key, refused):
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("llama"))
    manifest, config = read_manifest(path), file_config(path)
    first, *rest = manifest.layers
    spec = replace(first.tensors["attn_norm.weight"], name=f"blk.0.{key}")
    layers = (replace(first, tensors={**first.tensors, key: spec}), *rest)
    manifest = replace(manifest, layers=layers)
    if not refused:
        assert weight_names(manifest, config).notes == ()
        return
    with pytest.raises(UnsupportedModelError, match=f"'{key}' is no part of a llama"):
        weight_names(manifest, config)


def test_rope_factors_are_of_llama_files_alone(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("qwen2"), rope_factors=torch.ones(8))
    with pytest.raises(UnsupportedModelError, match=r"'rope_freqs.weight' is no part of a qwen2"):
        weight_names(read_manifest(path), file_config(path))


def with_tensor(path: Path, name: str) -> Manifest:
    """The manifest with one more tensor outside of layers: a norm's, by another name."""
    manifest = read_manifest(path)
    more = {name: replace(manifest.static["output_norm.weight"], name=name)}
    return replace(manifest, static={**manifest.static, **more})


MODELS = ("llama", "llama-tied", "llama-biases", "qwen2", "qwen2-tied", "qwen3", "mistral",
          "gemma3_text")  # fmt: skip
EXTRA = (
    "lm_head.weight", "lm_head.bias", "model.norm.bias", "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.o_proj.bias",
    "model.layers.0.mlp.down_proj.bias", "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale",
    "model.layers.1.pre_feedforward_layernorm.weight", "model.layers.3.input_layernorm.weight",
    "model.layers.2.post_attention_layernorm.bias", "transformer.wte.weight",
)  # fmt: skip


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_a_checkpoint_of_any_tensors_gives_the_text_of_transformers_or_none(tmp_path_factory, data):
    """With one tensor more, less, of another shape, or another tied flag."""
    name = data.draw(st.sampled_from(MODELS))
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"), model)
    stored = sorted(model.state_dict())
    change = data.draw(st.sampled_from(["more", "less", "shape", "tied", "layers"]))
    if change == "more":
        extra = data.draw(st.sampled_from(EXTRA))
        shape = (512, 64) if extra == "lm_head.weight" else (data.draw(st.sampled_from((16, 64))),)
        value = 0.5 if extra == "lm_head.weight" else data.draw(st.sampled_from((0.0, 0.5)))
        edit_weights(path, lambda t: t.setdefault(extra, torch.full(shape, value)))
    elif change == "less":
        gone = data.draw(st.sampled_from(stored))
        edit_weights(path, lambda t: t.pop(gone, None))
    elif change == "shape":
        cut = data.draw(st.sampled_from(stored))
        edit_weights(path, lambda t: t.update({cut: t[cut][:-1].clone()} if cut in t else {}))
    elif change == "tied":
        rewrite(path, tie_word_embeddings=data.draw(st.booleans()))
    else:
        rewrite(path, num_hidden_layers=data.draw(st.integers(1, 5)))
    try:
        found, _ = ours(path)
    except UnsupportedModelError as error:
        assert "\n" not in str(error)
        return
    assert relative_error(found, theirs(path)) <= 1e-5
