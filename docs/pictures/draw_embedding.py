"""Draws docs/pictures/embedding.svg: the life of a streamer, beside what its engine does.

Run from anywhere: ``python docs/pictures/draw_embedding.py``. Needs matplotlib. Lengths are chosen
to be read, not measured; docs/concepts.md has a measured pass.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

TARGET = Path(__file__).with_name("embedding.svg")
INK, FAINT, RULE = "#1f2933", "#7b8794", "#d9e2ec"
COLORS = {"you": "#f7d9a8", "copy": "#a8d8b9", "read": "#bcdff5", "open": "#d9e2ec"}
ROWS = {"you": 3.0, "copy": 2.0, "read": 1.0}
NAMES = {
    "you": "your thread\nand stream",
    "copy": "copier\nhost to device",
    "read": "readers\ndisk to host",
}
PHASES = {
    "before": (0.0, 1.7), "open": (1.75, 3.6), "a pass": (3.65, 8.2), "between": (8.25, 9.5),
    "a pass ": (9.55, 12.9), "end": (12.95, 13.8),
}  # fmt: skip
LAYERS = 4


def draw_box(ax: Axes, row: str, begin: float, end: float, text: str, color: str = "") -> None:
    """Something that takes time."""
    ax.add_patch(FancyBboxPatch(
        (begin + 0.03, ROWS[row] - 0.3), end - begin - 0.06, 0.6, ec="none",
        boxstyle="round,pad=0,rounding_size=0.06", fc=COLORS[color or row],
    ))  # fmt: skip
    place = ((begin + end) / 2, ROWS[row])
    ax.text(*place, text, ha="center", va="center", color=INK, size=7.4, linespacing=1.25)


def draw_layers(ax: Axes, row: str, begin: float, length: float, first: int = 0) -> None:
    """Layers one after the other, from the ``first`` on."""
    for layer_idx in range(first, LAYERS):
        at = begin + (layer_idx - first) * length
        draw_box(ax, row, at, at + length, str(layer_idx))


def draw_work(ax: Axes) -> None:
    """What everybody does."""
    draw_box(ax, "you", 0.0, 1.7, "plan_checkpoint:\nwhat is yours", "open")
    draw_box(ax, "you", 1.75, 3.6, "from_checkpoint\nload_static", "open")
    draw_box(ax, "read", 2.5, 3.6, "what stays", "open")
    draw_layers(ax, "read", 3.65, 0.8)
    draw_layers(ax, "copy", 4.45, 0.8)
    draw_layers(ax, "you", 5.25, 0.72)
    draw_box(ax, "you", 8.25, 9.5, "sample, see\nwho is next")
    for row, begin in (("read", 6.9), ("copy", 7.7)):
        draw_layers(ax, row, begin, 0.8)
    draw_layers(ax, "you", 9.55, 0.82)
    draw_box(ax, "read", 10.2, 11.0, "0")
    draw_box(ax, "read", 11.0, 11.8, "1")
    draw_box(ax, "copy", 11.0, 11.8, "0")
    draw_box(ax, "you", 12.95, 13.8, "close", "open")


def draw() -> None:
    """The whole picture."""
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"  # the same picture, the same file
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.family"] = "sans-serif"
    figure, ax = plt.subplots(figsize=(12.2, 3.4))
    for name, (begin, end) in PHASES.items():
        ax.text((begin + end) / 2, 3.62, name.strip(), ha="center", color=FAINT, size=9)
        ax.plot([end + 0.025] * 2, [0.55, 3.8], color=RULE, lw=1)
    for row, y in ROWS.items():
        ax.text(-0.15, y, NAMES[row], ha="right", va="center", color=INK, size=9, linespacing=1.3)
    draw_work(ax)
    notes = (
        (3.65, 0.35, "layer_fn is called as soon as a layer's copy is enqueued: the stream waits"),
        (8.25, 0.1, "between passes the first layers of the next one come"),
    )
    for x, y, text in notes:
        ax.text(x, y, text, color=FAINT, size=8.2)
    ax.set_xlim(-2.0, 13.9)
    ax.set_ylim(0.0, 3.9)
    ax.axis("off")
    figure.savefig(TARGET, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(TARGET)
