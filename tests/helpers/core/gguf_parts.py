"""Parts of a split GGUF model, byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

from checkpoints import gguf_bytes, gguf_kv, gguf_tensor


def write_part(path: Path, tensor: str | None, number: int, count: int) -> Path:
    """One part, of one tensor or none, with the keys that llama.cpp's splitter writes."""
    kvs = [
        gguf_kv("split.no", 2, struct.pack("<H", number)),
        gguf_kv("split.count", 2, struct.pack("<H", count)),
    ]
    tensors = [] if tensor is None else [gguf_tensor(tensor, [4], 0, 0)]
    path.write_bytes(gguf_bytes(kvs, tensors, bytes(16) if tensors else b""))
    return path
