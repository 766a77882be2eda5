"""Tiny GGUF files written from transformers models, and the models that they then hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig

from layer_streamer import read_manifest
from layer_streamer.llm.models.config import ModelConfig, model_config
from layer_streamer.llm.models.gguf_config import gguf_config
from layer_streamer.llm.models.gguf_names import GGUF_MODULES, GGUF_OUTPUT_NORMS
from layer_streamer.llm.models.rope import rope_frequencies
from layer_streamer.llm.models.rope_config import Rope, rope_of

MIXED = {
    "self_attn.q_proj": "Q4_1",
    "self_attn.k_proj": "Q8_0",
    "self_attn.v_proj": "F16",
    "self_attn.o_proj": "BF16",
    "mlp.gate_proj": "Q4_1",
    "mlp.up_proj": "Q5_0",
    "mlp.down_proj": "F32",
    "mlp.gate": "F32",
    "mlp.experts.gate_proj": "Q4_1",
    "mlp.experts.up_proj": "Q5_0",
    "mlp.experts.down_proj": "Q8_0",
    "mlp.shared_expert.gate_proj": "F16",
    "mlp.shared_expert.up_proj": "Q4_1",
    "mlp.shared_expert.down_proj": "Q8_0",
    "model.embed_tokens": "Q8_0",
    "lm_head": "Q4_1",
}
"""GGML type of each module's weight; vectors are always F32."""

STATIC = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


ARCHITECTURES = {
    "mistral": "llama", "gemma3_text": "gemma3", "mixtral": "llama", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip
"""Where GGUF's name of an architecture is not that of transformers."""


def write_gguf(
    path: Path,
    model: Any,
    *,
    rope_factors: torch.Tensor | None = None,
    tokenizer: bool = False,
    apart: bool = False,
) -> None:
    """Write the model with MIXED types, and put what the file then holds back into the model.

    As llama.cpp's converter does, rows of q and k are permuted for llama and mistral, norms of
    Gemma are stored with 1 added, and llama3 scaling becomes a tensor.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config.model_type, config.model_type))
    add_metadata(writer, config)
    if tokenizer:
        add_tokenizer(writer, config)
    for name, parameter in stored_parameters(model):
        module, _, kind = name.rpartition(".")
        values = parameter.numpy()
        target = _target(module, config)
        key = module if module in STATIC else ".".join(module.split(".")[3:])
        heads = _permuted_heads(config, key)
        shift = float(config.model_type == "gemma3_text" and "norm" in key)
        if heads:
            values = permute(values, heads)
        quant = MIXED[key] if values.ndim > 1 else "F32"
        ggml_type = gguf.GGMLQuantizationType[quant]
        packed = gguf.quants.quantize(np.ascontiguousarray(values + shift), ggml_type)
        if apart and values.ndim == 3:  # a tensor for each expert, as older files have
            for expert, own in enumerate(packed):
                name = f"{target.removesuffix('_exps')}.{expert}.{kind}"
                writer.add_tensor(name, own, raw_dtype=ggml_type)
        else:
            writer.add_tensor(f"{target}.{kind}", packed, raw_dtype=ggml_type)
        stored = gguf.quants.dequantize(packed, ggml_type).reshape(values.shape) - shift
        if heads:
            stored = unpermute(stored, heads)
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(stored)))
    if rope_factors is None and config.rope_parameters.get("rope_type") == "llama3":
        rope, width = rope_of(config), _head_dim(config)
        rope_factors = rope_frequencies(Rope(rope.theta), width) / rope_frequencies(rope, width)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each as a file has it: gates apart from what they are stacked with, a gate of one row as a
    vector."""
    for name, parameter in model.named_parameters():
        stem, values = name.removesuffix("gate_up_proj"), parameter.data
        if stem != name:
            half = values.shape[1] // 2
            yield f"{stem}gate_proj.weight", values[:, :half]
            yield f"{stem}up_proj.weight", values[:, half:]
        elif ".experts." in name:
            yield f"{name}.weight", values
        else:
            yield name, values[0] if "shared_expert_gate" in name else values


def add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """What a converter says of the model, but for its tokenizer."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(config.eos_token_id)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if getattr(config, "clip_qkv", None):
        writer.add_clamp_kqv(config.clip_qkv)
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        writer.add_float32("gemma3.rope.freq_base_swa", local["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


MERGE = "a b"
"""The first of the tokenizer. There are two: of an array of one text, some releases of transformers
make the text."""
PRE = "default"
ADD_BOS: bool | None = None
"""Of the tokenizer; what is None is not in the file."""


def add_tokenizer(writer: gguf.GGUFWriter, config: Any) -> None:
    """One token a byte, which any text can be made of."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = ["<unk>", "<s>", "</s>", *(letters[byte] for byte in range(256))]
    tokens += ["ab", "abab"]  # which the merges make
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [control if token[0] + token[-1] == "<>" else normal for token in tokens]
    )
    writer.add_token_merges([MERGE, "ab ab"])
    writer.add_bos_token_id(1)
    if ADD_BOS is not None:
        writer.add_add_bos_token(ADD_BOS)


def _head_dim(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _target(module: str, config: Any) -> str:
    if module in STATIC:
        return STATIC[module]
    parts = module.split(".")
    if parts[3] == "mlp" and hasattr(config, "num_experts_per_tok"):  # by gguf's own names
        (kind,) = (
            key
            for key, name in gguf.MODEL_ARCH_NAMES.items()
            if name == ARCHITECTURES.get(config.model_type, config.model_type)
        )
        found = gguf.get_tensor_name_map(kind, config.num_hidden_layers).get_name(module)
        assert found is not None
        return str(found)
    names = GGUF_MODULES | (GGUF_OUTPUT_NORMS if config.model_type == "gemma3_text" else {})
    return f"blk.{parts[2]}.{names['.'.join(parts[3:])]}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Per head, rows (i, i + E/2) become neighbours (2i, 2i + 1)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _permuted_heads(config: Any, key: str) -> int:
    if config.model_type not in ("llama", "mistral", "mixtral"):
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(key.rpartition(".")[2], 0)


def file_config(path: Path) -> ModelConfig:
    """What the engine makes of a file's own keys."""
    fields = gguf_config(read_manifest(path))
    return model_config(AutoConfig.for_model(**fields))
