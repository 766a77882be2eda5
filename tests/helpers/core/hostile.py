"""What the tests of hostile checkpoints share: parts of headers, and the error they must end in."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
from checkpoints import gguf_kv, gguf_tensor

from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.errors import CheckpointError


def rejection(path: Path) -> str:
    """The message of the CheckpointError that reading gives: one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    assert len(message.replace(str(path), "")) < 1000
    return message


def entry(shape: str = "[2]", offsets: str = "[0,8]", dtype: str = '"F32"') -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def record(dims: Iterable[int] = (4,), kind: int = 0, offset: int = 0, name: str = "a") -> bytes:
    return gguf_tensor(name, list(dims), kind, offset)


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return gguf_kv("k", 9, struct.pack("<IQ", kind, count) + payload)
