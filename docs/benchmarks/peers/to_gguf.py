"""The weights of a folder of transformers as a GGUF file, for those that read nothing else.

    python -m peers.to_gguf FOLDER OUT

Llama, Mistral, Qwen2 and Qwen3 in bfloat16; vectors become float32, which llama.cpp asks for, and
nothing is packed. The tokenizer is one of bytes: a benchmark gives token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def gguf_tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in GGUF, with what goes there; read when its turn comes."""
    from safetensors import safe_open

    from layer_streamer.llm.models.gguf_names import GGUF_STATIC, gguf_module

    halves = ARCHITECTURES[config["model_type"]] == "llama"
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                module, _, kind = name.rpartition(".")
                tensor = file.get_tensor(name)
                if module in GGUF_STATIC:
                    yield f"{GGUF_STATIC[module]}.{kind}", tensor
                    continue
                _, _, layer_idx, own = module.split(".", 3)
                if halves and own in heads:  # llama.cpp turns neighbours, transformers halves
                    rows = tensor.unflatten(0, (heads[own], 2, -1))
                    tensor = rows.transpose(1, 2).flatten(0, 2)
                yield f"blk.{layer_idx}.{gguf_module(own)}.{kind}", tensor


def write_gguf(folder: Path, out: Path) -> None:
    """Write it, in two looks at the folder: names and sizes, then bytes."""
    sys.path.append(str(Path(__file__).parents[3] / "examples" / "make"))
    import gguf
    import made_gguf

    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = (config.get("rope_parameters") or config)["rope_theta"]
    if isinstance(config["eos_token_id"], list):
        config["eos_token_id"] = config["eos_token_id"][0]
    writer = gguf.GGUFWriter(out, ARCHITECTURES[config["model_type"]])
    metadata = made_gguf._metadata(config) | made_gguf._tokenizer(config)
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
    kinds |= {float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_key_value(key, value, kinds[type(value)])
    for name, tensor in gguf_tensors(folder, config):
        kind, nbytes = kind_of(gguf, tensor)
        writer.add_tensor_info(name, list(tensor.shape), None, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in gguf_tensors(folder, config):
        if tensor.dim() == 1:
            writer.write_tensor_data(tensor.float().numpy())
        else:
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def kind_of(gguf: Any, tensor: torch.Tensor) -> tuple[Any, int]:
    """The type in GGUF, and bytes."""
    if tensor.dim() == 1:
        return gguf.GGMLQuantizationType.F32, 4 * tensor.numel()
    if tensor.dtype != torch.bfloat16:
        raise ValueError(f"{tensor.dtype}: matrices in bfloat16 are written, no others")
    return gguf.GGMLQuantizationType.BF16, 2 * tensor.numel()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
