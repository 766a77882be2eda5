"""Rows for people of what ``measure_finetune.py`` has measured, and their limits."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

GIB = 1 << 30


def describe(record: dict[str, Any], resident: dict[str, Any]) -> str:
    """One row. ``resident``: that of the same case; empty if unknown."""
    seconds, row = record["seconds"], f"{record['regime']:<14}"
    compute = median(resident["seconds"]) if resident else 0.0
    row += f" {median(seconds):.4f} s a step [{min(seconds):.4f} .. {max(seconds):.4f}]"
    if record.get("limit") and any(record["limit"]):
        limits = [max(link, compute) for link in record["limit"]]
        ratio = median(a / b for a, b in zip(seconds, limits, strict=True))
        row += f", {ratio:.3f} x the longer of link {median(record['limit']):.4f} s"
        row += f" ({sum(record['ways']) / 1e9:.2f} GB; twice what streams is "
        row += f"{2 * record['streams'] / 1e9:.2f}) and compute {compute:.4f} s"
        if "halves" in resident:
            longer = both_ways(record, resident["halves"])
            row += f"; {median(seconds) / longer:.3f} x the longer on each way, {longer:.4f} s"
    if record["peak"]:
        row += f"; torch's peak {record['peak'] / GIB:.2f} GiB, reserved "
        row += f"{record['reserved'] / GIB:.2f}"
    return row


def both_ways(record: dict[str, Any], halves: list[list[float]]) -> float:
    """Seconds of the longer of link and compute on the way forward, and of that on the way back:
    what one of them does not need of its way, the other's does not get."""
    rate = sum(record["ways"]) / median(record["limit"])
    ways = zip(record["ways"], zip(*halves, strict=True), strict=True)
    return sum(max(nbytes / rate, median(seconds)) for nbytes, seconds in ways)


def resident_of(out: Path, name: str) -> dict[str, Any]:
    """The resident regime of the same case, as it stands last in OUT; empty if it does not."""
    lines = out.read_text().splitlines() if out.exists() else []
    case = name.partition(" ")[0]
    found = map(json.loads, reversed(lines))
    return next((record for record in found if record["regime"] == f"{case} resident"), {})
