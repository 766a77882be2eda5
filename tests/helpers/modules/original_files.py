"""Tiny diffusion transformers in the layout that their makers publish, as one file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
SD3_OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
SD3_INSIDE = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def original_sd3(model: Any) -> Tensors:
    """SD3's: queries, keys and values in one matrix; the last shifts and scales the other way."""
    state: Tensors = dict(model.state_dict())
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}.norm1_context.linear"
    for stem in (last, "norm_out.linear"):
        for leaf in ("weight", "bias"):
            state[f"{stem}.{leaf}"] = torch.cat(state[f"{stem}.{leaf}"].chunk(2)[::-1])
    names = {"norm_out.linear": "final_layer.adaLN_modulation.1", **SD3_OUTSIDE}
    found: Tensors = {}
    for i in range(len(model.transformer_blocks)):
        block, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        names |= {block + ours: theirs + name for ours, name in SD3_INSIDE.items()}
        for fused, parts in SD3_FUSED.items():
            for leaf in ("weight", "bias"):
                pieces = [state.pop(f"{block}{part}.{leaf}") for part in parts]
                found[f"{theirs}{fused}.{leaf}"] = torch.cat(pieces)
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        new = names.get(name) or f"{names.get(stem, stem)}.{leaf}"
        found[new] = tensor
    return _prefixed(found)


def original_ltx(model: Any) -> Tensors:
    """LTX's: other words for the same tensors."""
    words = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm",
             "norm_k": "k_norm"}  # fmt: skip
    pattern = re.compile("|".join(words))
    state = model.state_dict().items()
    return _prefixed({pattern.sub(lambda m: words[m[0]], name): t for name, t in state})


def _prefixed(tensors: Tensors) -> Tensors:
    return {f"model.diffusion_model.{name}": t.clone() for name, t in tensors.items()}


ORIGINALS: dict[str, Callable[[Any], Tensors]] = {
    "SD3Transformer2DModel": original_sd3,
    "LTXVideoTransformer3DModel": original_ltx,
}


def write_safetensors(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_packed(path: Path, tensors: Tensors, kind: str) -> Path:
    """A GGUF file: matrices of blocks in ``kind``, as far as their rows can be, the rest as is."""
    writer = gguf.GGUFWriter(path, "diffusion")
    wanted = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        size = gguf.GGML_QUANT_SIZES[wanted][0]
        if tensor.dim() == 2 and "blocks." in name and tensor.shape[1] % size == 0:
            writer.add_tensor(name, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def flux_rows(blocks: int, singles: int, width: int = 3072) -> dict[str, tuple[int, ...]]:
    """Shapes of Flux's tensors in its makers' layout, whose width diffusers takes for granted."""
    streams = ("img", "txt")
    found = {"img_in": (width, 64), "txt_in": (width, 4096), "final_layer.linear": (64, width),
             "final_layer.adaLN_modulation.1": (2 * width, width)}  # fmt: skip
    for name, size in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        found |= {f"{name}.in_layer": (width, size), f"{name}.out_layer": (width, width)}
    norms = []
    for i in range(blocks):
        for name in (f"double_blocks.{i}.{stream}" for stream in streams):
            found |= {f"{name}_mod.lin": (6 * width, width), f"{name}_mlp.0": (4 * width, width),
                      f"{name}_attn.qkv": (3 * width, width), f"{name}_mlp.2": (width, 4 * width),
                      f"{name}_attn.proj": (width, width)}  # fmt: skip
            norms.append(f"{name}_attn.norm")
    for i in range(singles):
        name = f"single_blocks.{i}"
        found |= {f"{name}.modulation.lin": (3 * width, width),
                  f"{name}.linear1": (7 * width, width),
                  f"{name}.linear2": (width, 5 * width)}  # fmt: skip
        norms.append(f"{name}.norm")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in found.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in found.items()}
    return shapes | {f"{n}.{which}_norm.scale": (128,) for n in norms for which in ("query", "key")}
