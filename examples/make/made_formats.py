"""The tensors of made-up checkpoints whose matrices are packed, and the configs that say how.

The layers' matrices are packed; embedding, head, norms and biases are plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from random_packed import Fill, code_scale
from shapes import STACKED

from layer_streamer.llm.quantize.grouping import GROUPS, quantization_config
from layer_streamer.llm.quantize.shards import Entry

FORMATS = ("ct4", "ct8", "fp8", "mxfp4")
"""Of safetensors; for those of GGUF see ``made_gguf``."""
BLOCK = 128
"""Rows and columns that share a scale of fp8."""
GROUP = 32
"""Columns that share a power of two of mxfp4."""


def packed_tensors(
    shapes: Mapping[str, tuple[int, ...]], kind: str, dtype: str
) -> tuple[dict[str, Entry], dict[str, Fill], dict[str, Any]]:
    """Every tensor of the checkpoint, what the packed ones are filled with, and the
    quantization_config.

    ValueError if no group divides a matrix, or if the format is not one of these experts.
    """
    if kind == "mxfp4":
        return _mxfp4(shapes, dtype)
    if any(map(is_stacked, shapes)):
        raise ValueError(f"--format {kind}: experts that lie stacked are not packed so")
    matrices = {name for name in shapes if _is_packed(name)}
    group = 0 if kind == "fp8" else _group({shapes[name][1] for name in matrices})
    entries: dict[str, Entry] = {}
    fills: dict[str, Fill] = {}
    for name, shape in shapes.items():
        if name not in matrices:
            entries[name] = Entry(dtype, shape)
            continue
        module, (rows, width) = name.removesuffix(".weight"), shape
        parts = _fp8(rows, width) if kind == "fp8" else _ct(rows, width, group, kind)
        for part, entry, filled in parts:
            entries[f"{module}.{part}"], fills[f"{module}.{part}"] = entry, filled
    routers = {name.split(".", 3)[3].removesuffix(".weight") for name in shapes if _is_router(name)}
    return entries, fills, _config(kind, group, sorted(routers))


def is_stacked(name: str) -> bool:
    """True: a matrix of all experts of a layer."""
    return name.endswith(STACKED)


def _mxfp4(
    shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> tuple[dict[str, Entry], dict[str, Fill], dict[str, Any]]:
    """The experts' matrices alone are packed, rows before columns."""
    if not any(map(is_stacked, shapes)):
        raise ValueError("--format mxfp4: only experts that lie stacked are packed so")
    entries: dict[str, Entry] = {}
    fills: dict[str, Fill] = {}
    for name, shape in shapes.items():
        if not is_stacked(name):
            entries[name] = Entry(dtype, shape)
            continue
        count, width, rows = shape
        if width % GROUP:
            raise ValueError(f"--format mxfp4: no block of it divides {width} columns")
        groups = (count, rows, width // GROUP)
        entries[f"{name}_blocks"] = Entry("uint8", (*groups, GROUP // 2))
        entries[f"{name}_scales"] = Entry("uint8", groups)
        for part, kind in (("blocks", "codes"), ("scales", "exponents")):
            fills[f"{name}_{part}"] = Fill(kind, entries[f"{name}_{part}"].nbytes)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": [*plain, "lm_head"]}
    return entries, fills, config


def _is_router(name: str) -> bool:
    return name.endswith(".gate.weight")


def _is_packed(name: str) -> bool:
    """True: a matrix of a layer, but for the router of a mixture of experts."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return ".layers." in name and (last.endswith("proj") or last in ("w1", "w2", "w3"))


def _group(widths: set[int]) -> int:
    """Columns that share a scale of ct4 and ct8: the first that divides all widths."""
    for group in GROUPS:
        if not any(width % group for width in widths):
            return group
    raise ValueError(f"no group of {', '.join(map(str, GROUPS))} divides {sorted(widths)} columns")


def _ct(rows: int, width: int, group: int, kind: str) -> Iterator[tuple[str, Entry, Fill]]:
    words = Entry("int32", (rows, width * int(kind[2:]) // 32))
    yield "weight_packed", words, Fill("codes", words.nbytes)
    scale = Entry("float16", (rows, width // group))
    yield "weight_scale", scale, Fill("scale", scale.nbytes, "float16", code_scale(kind))
    content = rows.to_bytes(8, "little") + width.to_bytes(8, "little")
    yield "weight_shape", Entry("int64", (2,)), Fill("exact", 16, content=content)


def _fp8(rows: int, width: int) -> Iterator[tuple[str, Entry, Fill]]:
    weight = Entry("float8_e4m3fn", (rows, width))
    yield "weight", weight, Fill("fp8", weight.nbytes)
    scale = Entry("float32", (-(-rows // BLOCK), -(-width // BLOCK)))
    mean = code_scale("fp8")
    yield "weight_scale_inv", scale, Fill("scale", scale.nbytes, "float32", mean)


def _config(kind: str, group: int, routers: list[str]) -> dict[str, Any]:
    """``routers``: modules of a layer that are not packed."""
    if kind == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", *routers],
            "weight_block_size": [BLOCK, BLOCK],
        }
    found = quantization_config({"Linear": group}, int(kind[2:]))
    ignored = [f"re:.*{router.replace('.', '[.]')}$" for router in routers]
    return found | {"ignore": [*found["ignore"], *ignored]}
