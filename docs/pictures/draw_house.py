"""Draws docs/pictures/house.svg: the wings of the library, and what each says of itself.

Run from anywhere: ``python docs/pictures/draw_house.py``. Needs matplotlib. Names, sentences and
modules are read from the code.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

TARGET = Path(__file__).with_name("house.svg")
LIBRARY = Path(__file__).resolve().parents[2] / "layer_streamer"
INK, FAINT = "#1f2933", "#52606d"
ROWS = (
    ("tools",),
    ("llm", "tuner"),
    ("doctor",),
    ("measuring",),
    ("modules",),
    ("streamer", "assembly", "preview"),
    ("passes",),
    ("transport",),
    ("devices",),
    ("experts",),
    ("planning",),
    ("checkpoint",),
    ("machine",),
)
COLORS = {
    "tools": "#d9e2ec", "llm": "#d9e2ec", "tuner": "#d9e2ec", "measuring": "#d9e2ec",
    "doctor": "#d9e2ec", "modules": "#f7d9a8",
    "passes": "#f7d9a8", "transport": "#a8d8b9", "devices": "#a8d8b9", "planning": "#bcdff5",
    "experts": "#bcdff5",
    "checkpoint": "#bcdff5", "machine": "#bcdff5",
}  # fmt: skip
WIDTH, HEIGHT, GAP = 12.0, 0.86, 0.16


def sentence(wing: str) -> str:
    """The first paragraph of what a folder or a module says of itself."""
    place = LIBRARY / wing
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].replace("``", "").split())


def rooms(wing: str) -> str:
    """Its modules, or its folders where it has some."""
    place = LIBRARY / wing
    if not place.is_dir():
        return ""
    folders = [f"{path.parent.name}/" for path in place.glob("*/__init__.py")]
    modules = [path.stem for path in place.glob("*.py") if path.stem != "__init__"]
    return ", ".join(sorted(folders) + sorted(modules))


def draw_wing(ax: Axes, x: float, y: float, width: float, wing: str) -> None:
    """A box: the name, the sentence, the rooms."""
    color = COLORS.get(wing, "#f7d9a8")
    box = FancyBboxPatch((x, y), width, HEIGHT, boxstyle="round,pad=0.02", fc=color, ec="none")
    ax.add_patch(box)
    slash = "/" if (LIBRARY / wing).is_dir() else ""
    ax.text(x + 0.12, y + 0.66, wing + slash, color=INK, weight="bold", size=10, va="center")
    columns = int(width * 12.4)
    said = textwrap.wrap(sentence(wing), columns - 20)[0:1] if width > 10 else [""]
    ax.text(x + 1.75, y + 0.66, said[0], color=INK, size=8.4, va="center")
    told, size = rooms(wing) if slash else sentence(wing), 7.4
    lines = textwrap.wrap(told, columns)
    if len(lines) > 3:
        lines, size = textwrap.wrap(told, int(columns * 1.36)), 5.5
    below, spacing = (0.27, 1.25) if len(lines) < 3 else (0.25, 1.05)
    ax.text(
        x + 0.12, y + below, "\n".join(lines[:4]), color=FAINT if slash else INK, size=size,
        va="center", linespacing=spacing,
    )  # fmt: skip


def draw() -> None:
    """The whole picture."""
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"  # the same picture, the same file
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.family"] = "sans-serif"
    figure, ax = plt.subplots(figsize=(12.6, 12.2))
    for number, row in enumerate(ROWS):
        y = (len(ROWS) - number) * (HEIGHT + GAP)
        width = (WIDTH - GAP * (len(row) - 1)) / len(row)
        for i, wing in enumerate(row):
            draw_wing(ax, i * (width + GAP), y, width, wing)
    note = "each wing imports only from those below it; beside them all: errors, progress"
    ax.text(WIDTH / 2, 0.72, note, color=FAINT, size=9, ha="center", va="center")
    ax.set_xlim(-0.1, WIDTH + 0.1)
    ax.set_ylim(0.5, (len(ROWS) + 1) * (HEIGHT + GAP))
    ax.axis("off")
    figure.savefig(TARGET, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(TARGET)
