"""Made-up GGUF files: header, metadata, a tokenizer of bytes, and the tensors of a model.

Rows of q and k are as random as all others, so that it does not matter that converters permute
them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from random_packed import GGML_TYPES, Fill
from shapes import EXPERTS
from shards import Shard

from layer_streamer.llm.models.gguf_names import GGUF_STATIC, gguf_module
from layer_streamer.llm.models.modules import MATRICES, ROUTER, expert_module, expert_of

FORMATS = {"q4_k": ("Q4_K", "Q5_0"), "q8_0": ("Q8_0",)}
"""Of each format, the type of matrices, and that of widths which its blocks do not divide."""
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""GGUF's names of types of models, where they are others."""
ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""GGUF's numbers of the types of metadata that are written."""
NORMAL, CONTROL = 1, 3
"""Types of tokens."""


def gguf_file(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kind: str, mark: str
) -> tuple[Shard, dict[str, Fill]]:
    """The file, and what its packed tensors are filled with. ``mark`` goes into the metadata."""
    if config["model_type"] == "gpt_oss":
        raise ValueError(f"--format {kind}: experts that lie stacked are not packed so")
    metadata = _metadata(config) | {"general.description": mark} | _tokenizer(config)
    infos, fills, counts = b"", dict[str, Fill](), dict[str, int]()
    end = 0
    for own, shape in _stacked(config, shapes).items():
        ggml_type = _type(own, shape, kind)
        number, weights, nbytes = GGML_TYPES[ggml_type]
        size = prod(shape) // weights * nbytes
        infos += _text(own) + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", length) for length in reversed(shape))
        infos += struct.pack("<IQ", number, end)
        counts[own] = prod(shape)
        if ggml_type != "F32":
            fills[own] = Fill(ggml_type, size)
        end += size + -size % ALIGNMENT
    pairs = b"".join(_text(key) + _value(value) for key, value in metadata.items())
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(counts), len(metadata)) + pairs + infos
    header += b"\0" * (-len(header) % ALIGNMENT)
    return Shard("made.gguf", header, counts, len(header) + end, 0, ALIGNMENT), fills


def _stacked(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The tensors by their names in GGUF, where all experts of a layer have one for each of their
    matrices."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if module in GGUF_STATIC:
            found[f"{GGUF_STATIC[module]}.{kind}"] = shape
            continue
        _, _, layer_idx, own = module.split(".", 3)
        engine_name = _engine_name(config, own)
        target = f"blk.{layer_idx}.{gguf_module(engine_name)}.{kind}"
        stacked = expert_of(engine_name) is not None
        before = found.get(target, (0,))[0]
        found[target] = (before + 1, *shape) if stacked else shape
    return found


def _engine_name(config: Mapping[str, Any], module: str) -> str:
    """What the engine calls a layer's module, by its name on the hub."""
    experts = EXPERTS.get(config["model_type"])
    if experts is None or not module.startswith(experts.block):
        return module
    if module.endswith(".gate"):
        return ROUTER
    *_, expert, matrix = module.split(".")
    return expert_module(int(expert), MATRICES[experts.matrices.index(matrix)])


def _type(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or gguf_module(ROUTER) in name.split("."):
        return "F32"
    for ggml_type in FORMATS[kind]:
        if shape[-1] % GGML_TYPES[ggml_type][1] == 0:
            return ggml_type
    raise ValueError(f"--format {kind}: no block of it divides {shape[-1]} columns")


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
    }
    experts = EXPERTS.get(config["model_type"])
    if experts is not None:
        fields["expert_count"] = config[experts.count]
        fields["expert_used_count"] = config["num_experts_per_tok"]
        fields["expert_feed_forward_length"] = config[experts.width]
    named = {f"{architecture}.{key}": value for key, value in fields.items()}
    return {"general.architecture": architecture, "general.alignment": ALIGNMENT} | named


def _tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """One token a byte, by which any text can be given; the others are unused.

    Bytes that are not printable have letters from 256 on, as in every byte-level vocabulary.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
    size, bos, eos = (config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id"))
    special = {eos: "<eos>"} if bos is None else {bos: "<bos>", eos: "<eos>"}
    tokens, left = list[str](), iter([*letters, "ab", "abab"])
    for number in range(size):
        tokens.append(special.get(number) or next(left, None) or f"<unused{number}>")
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if i in special else NORMAL for i in range(size)],
        # Two: of an array of one text, some releases of transformers make the text.
        "tokenizer.ggml.merges": ["a b", "ab ab"],
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": False,
    }
    return found if bos is None else found | {"tokenizer.ggml.bos_token_id": bos}


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    """A value of metadata, with its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value[0], str):
        texts = b"".join(map(_text, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts
    numbers = struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<IIQ", ARRAY, INT32, len(value)) + numbers
