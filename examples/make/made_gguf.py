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
from shards import Shard

from layer_streamer.llm.models.gguf_names import GGUF_MODULES, GGUF_STATIC

FORMATS = {"q4_k": ("Q4_K", "Q5_0"), "q8_0": ("Q8_0",)}
"""Of each format, the type of matrices, and that of widths which its blocks do not divide."""
ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""GGUF's numbers of the types of metadata that are written."""
NORMAL, CONTROL = 1, 3
"""Types of tokens."""


def gguf_file(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kind: str, mark: str
) -> tuple[Shard, dict[str, Fill]]:
    """The file, and what its packed tensors are filled with. ``mark`` goes into the metadata."""
    metadata = _metadata(config) | {"general.description": mark} | _tokenizer(config)
    infos, fills, counts = b"", dict[str, Fill](), dict[str, int]()
    end = 0
    for name, shape in shapes.items():
        ggml_type = _type(shape, kind)
        number, weights, nbytes = GGML_TYPES[ggml_type]
        own, size = _name(name), prod(shape) // weights * nbytes
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


def _type(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    for ggml_type in FORMATS[kind]:
        if shape[1] % GGML_TYPES[ggml_type][1] == 0:
            return ggml_type
    raise ValueError(f"--format {kind}: no block of it divides {shape[1]} columns")


def _name(name: str) -> str:
    """In GGUF, of a tensor by its name in transformers."""
    module, _, kind = name.rpartition(".")
    if module in GGUF_STATIC:
        return f"{GGUF_STATIC[module]}.{kind}"
    _, _, layer_idx, own = module.split(".", 3)
    return f"blk.{layer_idx}.{GGUF_MODULES[own]}.{kind}"


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = config["model_type"]
    heads = config["num_attention_heads"]
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["hidden_size"] // heads,
        "attention.value_length": config["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
    }
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
    special = {bos: "<bos>", eos: "<eos>"}
    tokens, left = list[str](), iter([*letters, "ab", "abab"])
    for number in range(size):
        tokens.append(special.get(number) or next(left, None) or f"<unused{number}>")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if i in special else NORMAL for i in range(size)],
        # Two: of an array of one text, some releases of transformers make the text.
        "tokenizer.ggml.merges": ["a b", "ab ab"],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": False,
    }


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
