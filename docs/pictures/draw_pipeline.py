"""Draws docs/pictures/pipeline.svg: the way of a byte, and the threads that move it.

Run from anywhere: ``python docs/pictures/draw_pipeline.py``. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).with_name("pipeline.svg")
INK, FAINT = "#1f2933", "#7b8794"
TIERS = {"disk": "#d9e2ec", "host": "#bcdff5", "pinned": "#a8d8b9", "device": "#f7d9a8"}


def draw_tier(ax: Axes, x: float, title: str, note: str, color: str, slots: list[str]) -> None:
    """A tier with its slots, one box each."""
    ax.add_patch(
        FancyBboxPatch((x, 0.9), 1.7, 2.6, boxstyle="round,pad=0.06", fc="white", ec=color, lw=2.2)
    )
    ax.text(x + 0.85, 3.68, title, ha="center", va="bottom", color=INK, weight="bold", size=11)
    ax.text(x + 0.85, 0.68, note, ha="center", va="top", color=FAINT, size=8.2, linespacing=1.35)
    for i, label in enumerate(slots):
        y = 3.5 - 0.52 * (i + 1)
        ax.add_patch(
            FancyBboxPatch((x + 0.15, y), 1.4, 0.4, boxstyle="round,pad=0.02", fc=color, ec="none")
        )
        ax.text(x + 0.85, y + 0.2, label, ha="center", va="center", color=INK, size=8.5)


def draw_step(ax: Axes, x: float, verb: str, thread: str) -> None:
    """An arrow to the next tier, with the verb above and who does it below."""
    ax.add_patch(
        FancyArrowPatch((x, 2.2), (x + 1.26, 2.2), arrowstyle="-|>", mutation_scale=15, color=INK)
    )
    ax.text(x + 0.63, 2.34, verb, ha="center", va="bottom", color=INK, size=10, weight="bold")
    ax.text(x + 0.63, 2.06, thread, ha="center", va="top", color=FAINT, size=7.6, linespacing=1.3)


def draw() -> None:
    """The whole picture."""
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"  # the same picture, the same file
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.family"] = "sans-serif"
    figure, ax = plt.subplots(figsize=(12.6, 4.0))
    layers = [f"layer {i}" for i in range(5)]
    draw_tier(ax, 0.0, "disk", "safetensors or GGUF,\nread where it lies", TIERS["disk"], layers)
    draw_step(ax, 1.82, "read", "reader threads,\nin parallel")
    draw_tier(ax, 3.2, "host, pageable", "n_cpu + 1 slots\n(optional)", TIERS["host"], layers[3:5])
    draw_step(ax, 5.02, "memcpy", "one thread")
    draw_tier(
        ax, 6.4, "host, pinned", "n_cpu_pinned + 1 slots\n(optional)", TIERS["pinned"], layers[2:4]
    )
    draw_step(ax, 8.22, "copy", "DMA on its\nown stream")
    draw_tier(
        ax, 9.6, "device", "n_gpu + 1 slots", TIERS["device"], ["layer 0: in use", "layer 1: ready"]
    )
    draw_step(ax, 11.42, "compute", "your thread,\nyour stream")
    ax.text(12.8, 2.2, "layer_fn", va="center", color=INK, size=12, family="monospace")
    ax.annotate(
        "after the last layer, the first layers of the next pass are already on their way",
        xy=(0.9, 4.35), xytext=(10.4, 4.62), color=FAINT, size=9, ha="right", va="center",
        arrowprops={"arrowstyle": "-|>", "color": FAINT, "connectionstyle": "arc3,rad=0.03"},
    )  # fmt: skip
    ax.set_xlim(-0.2, 14.2)
    ax.set_ylim(-0.1, 4.9)
    ax.axis("off")
    figure.savefig(TARGET, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(TARGET)
