"""Tiny GGUF files written from transformers models, and the models that they then hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llm.names import GGUF_MODULES

MIXED = {
    "self_attn.q_proj": "Q4_1",
    "self_attn.k_proj": "Q8_0",
    "self_attn.v_proj": "F16",
    "self_attn.o_proj": "BF16",
    "mlp.gate_proj": "Q4_1",
    "mlp.up_proj": "Q8_0",
    "mlp.down_proj": "F32",
    "model.embed_tokens": "Q8_0",
    "lm_head": "Q4_1",
}
"""GGML type of each module's weight; vectors are always F32."""

STATIC = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model: Any, *, rope_factors: torch.Tensor | None = None) -> None:
    """Write the model with MIXED types, and put what the file then holds back into the model.

    Rows of q and k are permuted for llama, as llama.cpp's converter does.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        values = parameter.detach().numpy()
        parts = module.split(".")
        if module in STATIC:
            key, target = module, STATIC[module]
        else:
            key = ".".join(parts[3:])
            target = f"blk.{parts[2]}.{GGUF_MODULES[key]}"
        heads = _permuted_heads(config, key)
        if heads:
            values = permute(values, heads)
        quant = MIXED[key] if values.ndim == 2 else "F32"
        ggml_type = gguf.GGMLQuantizationType[quant]
        packed = gguf.quants.quantize(np.ascontiguousarray(values), ggml_type)
        writer.add_tensor(f"{target}.{kind}", packed, raw_dtype=ggml_type)
        stored = gguf.quants.dequantize(packed, ggml_type).reshape(values.shape)
        if heads:
            stored = unpermute(stored, heads)
        parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(stored)))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Per head, rows (i, i + E/2) become neighbours (2i, 2i + 1)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _permuted_heads(config: Any, key: str) -> int:
    if config.model_type != "llama":
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(key.rpartition(".")[2], 0)
