"""Draws docs/pictures/experts.svg: how often experts are in slots when they are asked for.

Run from anywhere: ``python docs/pictures/draw_experts.py``. Needs matplotlib; takes some seconds.
The hits are those of the simulator, over a trace that is made here: always the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from layer_streamer.experts.hits import count_hits, most_hits
from layer_streamer.experts.policies import PolicyName, make_policy
from layer_streamer.experts.simulate import Choice
from layer_streamer.experts.trace import ExpertPass, Trace, TraceHeader

TARGET = Path(__file__).with_name("experts.svg")
SHAPE = TraceHeader(num_layers=12, num_experts=128, top_k=8)
TOKENS, EXPONENT = 400, 1.0
SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of all experts, those that there are slots for."""
CURVES: dict[Choice, tuple[str, str]] = {
    "belady": ("Belady: knows what comes", "#7b8794"),
    "lfu": ("lfu", "#2f8f5b"),
    "fixed": ("fixed, from another text", "#c77700"),
    "segmented": ("segmented, the default", "#1f6fb2"),
}
"""By policy, what is written of it and its color: first what hits most."""
INK, FAINT = "#1f2933", "#7b8794"


def make_traces() -> tuple[Trace, Trace]:
    """Two texts of one model: each layer asks for its experts by Zipf's law, in an order of its
    own, and each token for itself."""
    dice = random.Random(0)
    every = range(SHAPE.num_experts)
    orders = [dice.sample(every, len(every)) for _ in range(SHAPE.num_layers)]
    weights = [(rank + 1.0) ** -EXPONENT for rank in every]

    def route(order: Sequence[int]) -> tuple[int, ...]:
        chosen = dict[int, None]()
        while len(chosen) < SHAPE.top_k:
            chosen[dice.choices(order, weights)[0]] = None
        return tuple(chosen)

    def text() -> Trace:
        passes = (
            ExpertPass(1, tuple((layer, route(order)) for layer, order in enumerate(orders)))
            for _ in range(TOKENS)
        )
        return Trace(SHAPE, tuple(passes))

    return text(), text()


def hit_rate(trace: Trace, other: Trace, policy: Choice, share: float) -> float:
    """Of one pool for all layers, which is empty at first. The fixed set is the other text's."""
    steps = list(trace.steps())
    slots = round(share * SHAPE.num_layers * SHAPE.num_experts)
    asked = sum(map(len, steps))
    if policy == "belady":
        return most_hits(steps, slots) / asked
    name: PolicyName = policy
    counts = other.counts() if name == "fixed" else None
    made = make_policy(name, slots, SHAPE.top_k * SHAPE.num_layers, counts)
    return count_hits(steps, slots, made) / asked


def draw() -> None:
    """The whole picture."""
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"  # the same picture, the same file
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.family"] = "sans-serif"
    figure, ax = plt.subplots(figsize=(8.0, 4.6))
    # Not cut to what is drawn: where a curve lies would go by the fonts that are there.
    figure.subplots_adjust(left=0.09, right=0.97, bottom=0.13, top=0.97)
    trace, other = make_traces()
    for policy, (label, color) in CURVES.items():
        rates = [hit_rate(trace, other, policy, share) for share in SHARES]
        style = {"linestyle": "--" if policy == "belady" else "-", "marker": "o", "markersize": 4}
        ax.plot(SHARES, rates, color=color, label=label, lw=1.8, gid=f"curve-{policy}", **style)
    ax.set_xlim(0, 1.02)
    ax.set_ylim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "all"])
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_xlabel("slots, of all experts", color=INK)
    ax.set_ylabel("hits, of what is asked for", color=INK)
    ax.tick_params(length=0, colors=INK)
    ax.grid(color="#e4e7eb", lw=0.8)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right", frameon=False, labelcolor=INK)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_color("#cbd2d9" if side in ("left", "bottom") else "none")
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(TARGET)
