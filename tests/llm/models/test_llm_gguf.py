"""GGUF files of every architecture: config from the metadata, weights as the format stores them."""

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import gguf
import pytest
import torch
from assets import relative_error
from forward import open_forward
from gguf_models import file_config, write_gguf
from transformers import AutoConfig
from zoo import reference, stepwise, zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.models.config import ModelConfig, UnsupportedModelError, model_config
from layer_streamer.llm.models.gguf_config import gguf_config, window_note
from layer_streamer.llm.models.names import weight_names

GEMMA_FILE = {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 24}
"""What GGUF files of Gemma 3 cannot say is as it is in the published models."""
MIXTURE_FILES = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "olmoe-clipped": {"norm_topk_prob": False},
}
"""Whether what experts count is normed is as it is in these, too."""
CASES = {
    name: {}
    for name in (
        "llama", "llama-tied", "llama-biases", "llama-llama3", "llama-linear", "qwen2",
        "qwen2-tied", "qwen2-yarn", "qwen3", "qwen3-tied", "qwen3-yarn", "mistral", "mistral-full",
    )
} | {"gemma3_text": GEMMA_FILE} | MIXTURE_FILES  # fmt: skip


RARER = ("llama-tied", "llama-linear", "qwen2-tied", "qwen3-tied", "qwen3-yarn", "mistral-full")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in RARER else []) for n in CASES]
)
def test_a_file_gives_the_logits_of_the_model_that_it_holds(tmp_path, name):
    model, path = zoo_model(name, **CASES[name]), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    with open_forward(path, file_config(path)) as forward:
        found = stepwise(forward)
    assert relative_error(found, reference(model)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXTURE_FILES])
def test_bfloat16_of_a_file_is_as_near_to_float32_as_that_of_transformers(tmp_path, name):
    model, path = zoo_model(name, **CASES[name]), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    exact, config = reference(model), file_config(path)
    model.save_pretrained(tmp_path / "twin")
    theirs = reference(type(model).from_pretrained(tmp_path / "twin", dtype=torch.bfloat16))
    with open_forward(path, config, dtype=torch.bfloat16) as forward:
        ours = stepwise(forward)
    ours, theirs = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("name", CASES)
def test_the_config_of_a_file_is_that_of_its_safetensors_twin(tmp_path, name):
    model, path = zoo_model(name, **CASES[name]), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    found, expected = file_config(path), model_config(model.config)
    changes = {"norm_eps": pytest.approx(expected.norm_eps)}
    if name == "llama-llama3":  # the scaling is in a tensor
        changes["ropes"] = tuple(replace(rope, scaling=None) for rope in expected.ropes)
    if name == "mistral-full":
        changes["model_type"] = "llama"
    for field in ModelConfig.__slots__:
        assert getattr(found, field) == changes.get(field, getattr(expected, field)), field


def test_rows_whose_permutation_is_not_undone_show(tmp_path):
    model, path = zoo_model("llama"), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    config = file_config(path)
    names = replace(weight_names(read_manifest(path), config), interleaved_rope=False)
    with open_forward(path, config, names=names) as forward:
        assert relative_error(stepwise(forward), reference(model)) > 1e-3


def test_rope_factors_left_out_show(tmp_path):
    model, path = zoo_model("llama-llama3"), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    config = file_config(path)
    names = replace(weight_names(read_manifest(path), config), rope_factors=None)
    with open_forward(path, config, names=names) as forward:
        assert relative_error(stepwise(forward), reference(model)) > 1e-3


def test_norms_that_are_not_taken_as_stored_show(tmp_path):
    model, path = zoo_model("gemma3_text", **GEMMA_FILE), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    config = file_config(path)
    names = weight_names(read_manifest(path), config)
    assert names.norm_offset == 0.0
    with open_forward(path, config, names=replace(names, norm_offset=1.0)) as forward:
        assert relative_error(stepwise(forward), reference(model)) > 1e-3


REQUIRED = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDING = {"token_embd.weight": SimpleNamespace(shape=(512, 68))}


MIXED = {"llama__expert_count": 8, "llama__expert_used_count": 2}


def described(tmp_path, static=EMBEDDING, **changes) -> SimpleNamespace:
    """A manifest with this metadata; ``__`` in a key stands for a dot, None leaves a key out."""
    metadata = REQUIRED | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return SimpleNamespace(
        path=tmp_path / "a.gguf", metadata=MappingProxyType(metadata), static=static, layers=()
    )


def test_what_metadata_may_leave_out_has_the_formats_defaults(tmp_path):
    config = model_config(AutoConfig.for_model(**gguf_config(described(tmp_path))))
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 16, 512)
    assert config.rope(0).theta == 10_000.0 and config.window(0) is None
    assert config.tied_head and config.eos_ids == frozenset()


def test_ends_of_texts_turns_and_messages_end_a_text(tmp_path):
    keys = {f"tokenizer__ggml__{k}_token_id": i for i, k in enumerate(("eos", "eot", "eom", "bos"))}
    assert gguf_config(described(tmp_path, **keys))["eos_token_id"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "gemma2"}, "architecture 'gemma2' is not supported .only llama"),
        ({"general__architecture": None}, "'None' is not supported"),
        ({"llama__rope__scaling__type": "longrope"}, "rope type 'longrope' is not supported"),
        ({"llama__block_count": None}, "llama.block_count is missing: a single whole number"),
        ({"llama__feed_forward_length": "96"}, "feed_forward_length is '96': a single whole"),
        ({"llama__attention__head_count": True}, "head_count is True: a single whole"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "rms_epsilon is missing: a number"),
        ({"llama__rope__dimension_count": 8}, "dimension_count is 8: only the width of a head, 16"),
        ({"llama__attention__value_length": 8}, "value_length is 8: only the width of a head"),
        ({"llama__expert_count": 8}, "expert_used_count is missing: a single whole"),
        (MIXED | {"llama__expert_gating_func": 2}, "gating_func is 2: only a softmax, 1, is"),
        (MIXED | {"llama__expert_weights_scale": 2.5}, "weights_scale is 2.5: is not supported"),
        (MIXED | {"llama__expert_weights_norm": False}, "norm is False: .* always normed"),
        ({"general__architecture": "qwen3moe"}, "expert_count is missing: a model without experts"),
        ({"static": {}}, "'token_embd.weight' is missing"),
    ],
)
def test_metadata_that_the_engine_cannot_use_is_named_in_one_line(tmp_path, changes, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        gguf_config(described(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_linear_scaling_is_read_in_its_older_spelling(tmp_path):
    older = {"llama__rope__scaling__type": "linear", "llama__rope__scale_linear": 4.0}
    newer = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    found = [gguf_config(described(tmp_path, **keys))["rope_parameters"] for keys in (older, newer)]
    assert found[0] == found[1] and found[0]["factor"] == 4.0


def test_the_largest_gemma_3_scales_attention_by_its_share_of_the_hidden_size(tmp_path):
    for layers, scalar in ((26, 32), (62, 16)):
        manifest = gemma3_file(tmp_path, gemma3__block_count=layers)
        assert gguf_config(manifest)["query_pre_attn_scalar"] == scalar


def gemma3_file(tmp_path, **changes) -> SimpleNamespace:
    gemma = {key.replace("llama", "gemma3").replace(".", "__"): v for key, v in REQUIRED.items()}
    gemma |= {"general__architecture": "gemma3", "gemma3__attention__key_length": 32}
    return described(tmp_path, **gemma | changes)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, [9, 9, 9, 9, 9, None, 9]),
        (2, [9, None, 9, None, 9, None, 9]),
        (SimpleNamespace(load=lambda: [True, True, False] + [True] * 4), [9, 9, None] + [9] * 4),
    ],
)
def test_which_layers_of_gemma_3_have_a_window_is_as_published_or_as_the_file_says(
    tmp_path, pattern, windows
):
    keys = {"gemma3__block_count": 7, "gemma3__attention__sliding_window": 9}
    keys["gemma3__attention__sliding_window_pattern"] = pattern
    config = model_config(AutoConfig.for_model(**gguf_config(gemma3_file(tmp_path, **keys))))
    assert list(config.windows) == windows


def test_gemma_3_without_a_window_keeps_the_base_of_the_layers_that_had_one(tmp_path):
    manifest = gemma3_file(tmp_path, gemma3__block_count=7, gemma3__rope__freq_base=1e6)
    config = model_config(AutoConfig.for_model(**gguf_config(manifest)))
    assert config.windows == (None,) * 7
    assert [rope.theta for rope in config.ropes] == [1e4] * 5 + [1e6, 1e4]


def test_a_file_that_may_leave_out_a_window_says_that_none_is_applied(tmp_path):
    note = window_note(described(tmp_path))
    assert note == "a.gguf names no sliding window: every layer sees the whole context"
    assert window_note(described(tmp_path, llama__attention__sliding_window=9)) is None
    assert window_note(described(tmp_path, general__architecture="qwen2")) is None


def test_a_vocabulary_that_is_not_the_configs_is_named(tmp_path):
    model, path = zoo_model("llama"), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    config = replace(file_config(path), vocab_size=511)
    with pytest.raises(UnsupportedModelError, match=r"shape \[512, 64\], the config says \[511"):
        weight_names(read_manifest(path), config)


def test_the_tiny_files_hold_types_of_several_block_layouts(tmp_path):
    model, path = zoo_model("llama"), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {"F32", "F16", "BF16", "Q4_1", "Q5_0", "Q8_0"}
