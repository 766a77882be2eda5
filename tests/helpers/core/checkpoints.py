"""Writers of checkpoints for the tests: valid ones, odd ones, and ones byte by byte.

Safetensors files are assembled here, so that a test controls padding, gaps, order and lies in the
header; valid GGUF files are written by the real ``gguf.GGUFWriter``, hostile ones by gguf_bytes().
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from layer_streamer.planning.layout import CASTABLE

SAFETENSORS_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """A tensor of random bytes (floats hold any bit pattern; compare bytes), or of random bools."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator) > 0
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(tuple(shape))


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, row-major."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    padding: int = 0,
    gap: int = 0,
    order: Iterable[str] | None = None,
) -> Path:
    """A valid safetensors file; returns ``path``.

    ``padding`` spaces end the header (an odd number makes every offset odd), ``gap`` unused bytes
    lie before each tensor, ``order`` lists the names as their bytes follow in the file.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = bytearray()
    for name in tensors if order is None else order:
        data += b"\xa5" * gap
        payload = tensor_bytes(tensors[name])
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(payload)],
        }
        data += payload
    return write_raw_safetensors(path, json.dumps(header) + " " * padding, bytes(data))


def write_raw_safetensors(
    path: Path, header: str | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    """Header text and data as given; ``length`` replaces the true header length."""
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def write_index(directory: Path, weight_map: Mapping[str, str]) -> Path:
    """``model.safetensors.index.json`` with this weight_map; returns its path."""
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return path


def tiny_tensors(
    num_layers: int = 4,
    *,
    hidden: int = 8,
    dtype: torch.dtype = torch.float32,
    prefix: str = "model.layers.{i}.",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of a toy LLaMA: three a layer, and embedding, norm and head outside."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, hidden)}
    for i in range(num_layers):
        head = prefix.format(i=i)
        shapes[head + "input_layernorm.weight"] = (hidden,)
        shapes[head + "self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[head + "mlp.up_proj.weight"] = (2 * hidden, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (32, hidden)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        is_float = dtype.is_floating_point or dtype.is_complex
        tensors[name] = values.to(dtype) if is_float else values.mul(50).clamp(-99, 99).to(dtype)
    return tensors


def tiny_checkpoint(
    directory: Path,
    num_layers: int = 4,
    *,
    hidden: int = 8,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    index: bool = True,
    padding: int = 0,
) -> dict[str, torch.Tensor]:
    """A safetensors directory of tiny_tensors(); returns the tensors by full name.

    With ``num_shards`` > 1 the tensors are dealt out in turn, so that layers straddle shards, and
    ``index`` says whether an index file is written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors(num_layers, hidden=hidden, dtype=dtype)
    if num_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, padding=padding)
        return tensors
    weight_map = {}
    for k in range(num_shards):
        shard = f"model-{k + 1:05}-of-{num_shards:05}.safetensors"
        names = list(tensors)[k::num_shards]
        write_safetensors(directory / shard, {n: tensors[n] for n in names}, padding=padding)
        weight_map.update(dict.fromkeys(names, shard))
    if index:
        write_index(directory, weight_map)
    return tensors


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
    metadata: Mapping[str, Any] | None = None,
    *,
    alignment: int | None = None,
) -> Path:
    """A GGUF v3 file from the real writer; returns ``path``.

    A tensor is an array of a native dtype, or (rows of raw bytes, GGML type). Metadata values are
    bool, int (stored as int64), float (float64), str or a list of one of these.
    """
    writer = gguf.GGUFWriter(path, arch="llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int64(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        else:
            writer.add_string(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_string(text: str | bytes) -> bytes:
    """A GGUF string: its length, then its bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_kv(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    """A GGUF key-value record with this type id and these value bytes."""
    return gguf_string(key) + struct.pack("<I", value_type) + payload


def gguf_tensor(name: str | bytes, dims: Sequence[int], ggml_type: int, offset: int) -> bytes:
    """A GGUF tensor record; ``dims`` in the file's order, innermost first."""
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return gguf_string(name) + shape + struct.pack("<IQ", ggml_type, offset)


def gguf_bytes(
    kvs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    num_kvs: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from records; the counts may lie."""
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(kvs) if num_kvs is None else num_kvs,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def odd_checkpoint(directory: Path, *, finite: bool = False) -> dict[str, torch.Tensor]:
    """Layers that differ in keys, shapes and dtypes, at odd offsets, split over two files.

    ``finite``: without NaNs, of which CPUs and GPUs make different ones when they cast.
    """
    tensors = {"embed": random_tensor((5, 3), torch.float16)}
    dtypes = list(SAFETENSORS_NAMES)
    for i in range(7):
        for j in range(1 + i % 4):
            dtype = dtypes[(3 * i + j) % len(dtypes)]
            shape = [(), (7, 301), (0, 4), (4099,)][(i + j) % 4]
            tensor = random_tensor(shape, dtype, seed=i)
            tensors[f"model.layers.{i}.w{j}"] = (
                tensor.nan_to_num() if finite and dtype in CASTABLE else tensor
            )
    names = list(tensors)
    for part, some in enumerate((names[::2], names[1::2])):
        path = directory / f"model-{part}.safetensors"
        write_safetensors(path, {n: tensors[n] for n in some}, padding=1 + part, gap=part)
    return tensors
