"""What a simulation came to, as a table for people and as one JSON document. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .simulate import Simulated, count_asked
from .trace import Trace

LABEL = 20
NOTES = {
    "fixed": "fixed: its set is what {counted} asks for most",
    "belady": "belady: the most that any could hit, who knew what comes",
}


def describe(path: Path, trace: Trace, found: Sequence[Simulated], counted: Path) -> str:
    """A table: policies down, both kinds of pool across; for each number of slots."""
    header, asked = trace.header, count_asked(trace)
    nbytes = header.expert_nbytes
    size = "" if nbytes is None else f"; an expert is {nbytes / 1e6:,.2f} MB"
    lines = [
        f"{path}: {trace.tokens:,} tokens in {len(trace.passes):,} passes, {len(trace.layers)} "
        f"layers of {header.num_experts} experts, {header.top_k} for a token{size}",
        f"asked for {asked:,} experts{_without_a_pool(trace, asked)}",
        f"{'':<{LABEL}}{'a pool a layer':>22}{'one pool for all':>22}",
    ]
    for slots, rows in groupby(found, key=lambda one: one.slots):
        columns = f"{'hits':>10}{'MB a token':>12}" if nbytes is not None else f"{'hits':>22}"
        lines.append(f"{f'{slots} slots a layer':<{LABEL}}{columns * 2}")
        for name, both in groupby(rows, key=lambda one: one.policy):
            cells = "".join(_cell(one, asked) for one in both)
            lines.append(f"{'  ' + name:<{LABEL}}{cells}")
    # Belady's last, as in the table.
    names = {one.policy: None for one in found}
    said = [text for name, text in NOTES.items() if name in names]
    other = "this trace itself" if counted == path else str(counted)
    return "\n".join([*lines, *(text.format(counted=other) for text in said)])


def document(path: Path, trace: Trace, found: Sequence[Simulated], counted: Path) -> str:
    """One line of JSON: the header, what was asked for, and a row for each simulation."""
    return json.dumps(
        {
            "path": str(path),
            **asdict(trace.header),
            "tokens": trace.tokens,
            "passes": len(trace.passes),
            "layers": trace.layers,
            "asked": count_asked(trace),
            "fixed_from": str(counted),
            "rows": [asdict(one) for one in found],
        },
        separators=(",", ":"),
    )


def _without_a_pool(trace: Trace, asked: int) -> str:
    nbytes = trace.header.expert_nbytes
    return "" if nbytes is None else f": {asked * nbytes / trace.tokens / 1e6:,.1f} MB a token"


def _cell(one: Simulated, asked: int) -> str:
    share = f"{one.hits / asked:.1%}" if asked else "-"
    if one.nbytes_a_token is None:
        return f"{share:>22}"
    return f"{share:>10}{one.nbytes_a_token / 1e6:>12,.1f}"
