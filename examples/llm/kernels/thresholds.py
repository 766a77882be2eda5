"""From how many tokens on which kernel serves: defaults, and what was measured on this machine."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from layer_streamer import cache_path

logger = logging.getLogger(__name__)

PRODUCT_TOKENS = {"ct4": 4, "ct8": 8, "Q4_0": 8, "Q8_0": 6, "Q4_K": 4}
"""On an H200, with matrices of 32B: with more, tensor cores are faster (docs/benchmarks)."""
TILE_TOKENS = {"ct4": 64, "ct8": 64, "Q4_0": 64, "Q8_0": 32, "Q4_K": 64, "Q6_K": 64}
"""As many as a program takes at once: no weight is taken apart twice, while unpacking first writes
two bytes of each to memory and reads them again. Q8_0 of 64 tokens is no faster so on an H200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Token counts at which one way becomes faster than another."""

    product: Mapping[str, int] = field(default_factory=lambda: dict(PRODUCT_TOKENS))
    """By format: up to this many tokens a packed matrix is multiplied as it is, in float32. 0: it
    never is."""
    tiles: Mapping[str, int] = field(default_factory=lambda: dict(TILE_TOKENS))
    """By format: with more, up to this many, it is on tensor cores; with more yet it is unpacked
    first. 0: always."""
    norm: int = 1
    """From this many tokens on a norm is one kernel. Fewer: several of torch's."""
    swiglu: int = 1
    """The same of SwiGLU."""

    def __post_init__(self) -> None:
        counts = {"norm": self.norm, "swiglu": self.swiglu}
        for field_name, by_format in (("product", self.product), ("tiles", self.tiles)):
            counts |= {f"{field_name}[{kind}]": count for kind, count in by_format.items()}
        for name, count in counts.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"{name}={count!r}: not a number of tokens, 0 or more")


RECORD = "kernels.json"
"""The file with what was measured."""
NEVER = 1 << 30
"""More tokens than there are."""


def find_thresholds(
    products: Iterable[Mapping[str, Any]], pointwise: Iterable[Mapping[str, Any]]
) -> Thresholds:
    """What follows from measured rows: ``tokens``, ``fused_us``, ``plain_us``, and the ``format``
    or ``kernel``, in ascending order of tokens; of products ``tiles_us`` as well, and of these two
    those that the format has.

    A product is fused while that has been the fastest at every count up to that one, and on tensor
    cores while that has been faster than unpacking at every count since; a kernel serves from the
    first count on since which it has been faster. What was not measured is as by default.
    """
    product, tiles = dict(PRODUCT_TOKENS), dict(TILE_TOKENS)
    by_format: dict[str, list[Mapping[str, Any]]] = {}
    for row in products:
        by_format.setdefault(row["format"], []).append(row)
    for kind, rows in by_format.items():
        fused = _count(rows, "fused_us", ("tiles_us", "plain_us"))
        if any("fused_us" in row for row in rows):
            product[kind] = fused
        if any("tiles_us" in row for row in rows):
            more = [row for row in rows if row["tokens"] > fused]
            tiles[kind] = _count(more, "tiles_us", ("plain_us",))
    since: dict[str, int] = {}
    for row in pointwise:
        if row["fused_us"] >= row["plain_us"]:
            since[row["kernel"]] = NEVER
        elif since.setdefault(row["kernel"], row["tokens"]) == NEVER:
            since[row["kernel"]] = row["tokens"]
    return Thresholds(product=product, tiles=tiles, **since)


def _count(rows: Iterable[Mapping[str, Any]], way: str, others: tuple[str, ...]) -> int:
    """The tokens up to which a way has been faster than all others, or 0."""
    found = 0
    for row in rows:
        if way not in row or any(row[way] >= row.get(other, math.inf) for other in others):
            break
        found = row["tokens"]
    return found


def record_path() -> Path:
    """Where measured thresholds are kept, by the name of the GPU."""
    return cache_path(RECORD)


@lru_cache
def thresholds(gpu: str) -> Thresholds:
    """What was measured on this GPU, else the defaults. Read once a process."""
    found = _records().get(gpu)
    if found is None:
        return Thresholds()
    try:
        return Thresholds(**found)
    except (TypeError, ValueError, AttributeError) as error:
        logger.warning("%s: %s: not used: %s", record_path(), gpu, error)
        return Thresholds()


def save_thresholds(gpu: str, measured: Thresholds) -> Path:
    """Keep what was measured on this GPU, beside that of others."""
    path = cache_path(make=True) / RECORD
    text = json.dumps(_records() | {gpu: asdict(measured)}, indent=2)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    thresholds.cache_clear()
    return path


def _records() -> dict[str, Any]:
    try:
        found = json.loads(record_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: not used: %s", record_path(), error)
        return {}
    return found if isinstance(found, dict) else {}
