"""Rows of rivals.py as a table in Markdown, and as a picture.

python -m peers.table OUT.jsonl [PICTURE.svg]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GIB = 1 << 30
HEADINGS = (
    "peer",
    "version",
    "s a token",
    "tokens/s",
    "first token, s",
    "opened, s",
    "device peak, GiB",
    "host: its own, GiB",
    "the machine's, GiB",
    "",
)
TOLERANCE = 1.01
"""Of a limit, in what the driver counts."""


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with figures, the fastest first."""
    found = [row for row in rows if row["status"] == "measured"]
    return sorted(found, key=lambda row: float(row["seconds_per_pass"]))


def note(row: dict[str, Any]) -> str:
    """What a reader of figures must know."""
    notes = []
    limit = row["asked"]["device_nbytes"]
    if limit and not row["capped"]:
        notes.append("without the limit")
    elif limit and (row["device_peak"] or 0) > TOLERANCE * limit:
        notes.append("over the limit")
    if row.get("gpu_layers") is not None and row["asked"]["device"] != "cpu":
        notes.append(f"{row['gpu_layers']} layers on the GPU")
    if row.get("share", 1.0) < 1:
        notes.append(f"with {row['share']:.0%} of the budget")
    return ", ".join(notes)


def gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / GIB:.2f}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    opened = row.get("open_seconds")
    return (
        row["title"],
        row.get("version", ""),
        f"{row['seconds_per_pass']:.4f}",
        f"{row['tokens_per_second']:.2f}",
        f"{row['first_token']:.3f}",
        "" if opened is None else f"{opened:.1f}",
        gib(row["device_peak"]),
        gib(row["host_own"]),
        gib(row["host_taken"]),
        note(row),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All rows: figures, and beneath them those that have none, with the reason."""
    lines = [
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---" + "|--:" * (len(HEADINGS) - 3) + "|---|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in measured(rows)]
    others = [row for row in rows if row["status"] != "measured"]
    left = [f"* {row['title']}: {row['status']}, {row['reason']}" for row in others]
    return "\n".join(lines + ([""] + left if left else []))


def parts(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that can be compared, by what they have in common. Of a peer that was measured again
    the last row counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        asked, machine = row["asked"], row["machine"]
        where = (
            machine["gpus"][0] if asked["device"] != "cpu" else f"CPU, threads: {asked['threads']}"
        )
        limit = f", {gib(asked['device_nbytes'])} GiB of it" if asked["device_nbytes"] else ""
        title = f"{asked['checkpoint']} on {where}{limit}"
        found.setdefault(title, {})[row["peer"]] = row
    return {title: list(by_peer.values()) for title, by_peer in found.items()}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a peer: seconds a token, beside it the peak of device memory."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"
    from matplotlib import pyplot

    drawn = {title: measured(part)[::-1] for title, part in parts(rows).items()}
    heights = [max(len(part), 1) for part in drawn.values()]
    figure, all_axes = pyplot.subplots(
        len(drawn), squeeze=False, figsize=(8, 0.9 * len(drawn) + 0.3 * sum(heights)),
        layout="constrained", gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axes, (title, part) in zip(all_axes[:, 0], drawn.items(), strict=True):
        ours = ["tab:blue" if "layer-streamer" in row["title"] else "0.65" for row in part]
        seconds = [row["seconds_per_pass"] for row in part]
        bars = axes.barh([row["title"] for row in part], seconds, color=ours)
        axes.bar_label(bars, [label(row) for row in part], padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(min(seconds, default=1) / 2, max(seconds, default=1) * 4)
        axes.set_title(title, fontsize=9)
    all_axes[-1, 0].set_xlabel("seconds a token (logarithmic)")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def label(row: dict[str, Any]) -> str:
    """At a bar."""
    peak = f", {gib(row['device_peak'])} GiB" if row["device_peak"] else ""
    return f"{row['seconds_per_pass']:.3g} s{peak}"


def main() -> int:
    """Print the tables; draw the picture."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    for title, part in parts(rows).items():
        print(title, table(part), sep="\n\n", end="\n\n")
    if len(sys.argv) > 2:
        draw(rows, Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
