"""Draws docs/pictures/timeline.svg from docs/pictures/timeline.json, a pass's own timeline.

Run from anywhere: ``python docs/pictures/draw_timeline.py``. Needs matplotlib. The JSON is what
``streamer.last_pass.save_timeline()`` wrote; docs/concepts.md says of which pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
COLORS = {"read": "#d9e2ec", "memcpy": "#bcdff5", "copy": "#a8d8b9", "compute": "#f7d9a8"}
INK, FAINT = "#1f2933", "#7b8794"


def draw(source: Path, target: Path) -> None:
    """One row for each step (reads overlap: as many as they need), one bar for each layer."""
    events: list[dict[str, Any]] = json.loads(source.read_text())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    rows = sorted({event["tid"] for event in bars})
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"  # the same picture, the same file
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.family"] = "sans-serif"
    figure, ax = plt.subplots(figsize=(11, 0.5 * len(rows) + 1.0))
    for bar in bars:
        y = len(rows) - rows.index(bar["tid"])
        begin, length = bar["ts"] / 1e3, bar["dur"] / 1e3
        ax.barh(y, length, left=begin, height=0.8, color=COLORS[bar["cat"]], ec="white")
        number = bar["name"].removeprefix("layer ")
        ax.text(begin + length / 2, y, number, ha="center", va="center", size=8, color=INK)
    labels = {event["tid"]: event["cat"] for event in bars}
    ax.set_yticks([len(rows) - i for i in range(len(rows))], [labels[row] for row in rows])
    ax.set_xlabel("milliseconds", color=FAINT)
    ax.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(HERE / "timeline.json", HERE / "timeline.svg")
    print(HERE / "timeline.svg")
