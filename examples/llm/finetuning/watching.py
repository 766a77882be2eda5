"""What a run says of itself: its steps, seconds, what binds them, and the memory that they took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from layer_streamer import PassReport, format_bytes

WORDS = {
    "read": "the disk", "memcpy": "host memory", "copy": "the link to the device",
    "compute": "compute",
}  # fmt: skip


@dataclass
class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """What the trainer calls as it goes on. Thread rules: that of the trainer."""

    reports: Callable[[], Mapping[str, PassReport]]
    """By sequence of blocks, the last pass."""
    tell: Callable[[int, int, Mapping[str, float]], object]
    """Called after each step with its number, that of the last one, and the latest figures."""
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    losses: list[float] = field(default_factory=list)
    """Of each step."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Losses of what is held out, by the step after which it was looked at."""
    bound_by: dict[str, PassReport] = field(default_factory=dict)
    """The last step's passes back, by sequence."""
    _begin: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bound_by = dict(self.reports())  # waits for the device
        self.seconds.append(time.perf_counter() - self._begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            figures = {"loss": self.losses[-1], "seconds": self.seconds[-1]}
            self.tell(state.global_step, state.max_steps, figures)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if metrics and "eval_loss" in metrics:
            self.held_out.append((state.global_step, float(metrics["eval_loss"])))

    def lines(self) -> list[str]:
        """What is said at the end."""
        lines = []
        if self.seconds:
            some = self.seconds[1:] or self.seconds  # the first one makes what later ones use
            lines.append(f"{len(self.seconds)} steps, {median(some):.3f} s each{self._binds()}")
        if self.losses:
            lines.append(f"loss {self.losses[0]:.4f} at first, {self.losses[-1]:.4f} at last")
        if self.held_out:
            shown = ", ".join(f"{loss:.4f} after step {step}" for step, loss in self.held_out)
            lines.append(f"loss of what is held out: {shown}")
        return [*lines, peak_memory()]

    def _binds(self) -> str:
        if not self.bound_by:
            return ""
        longest = max(self.bound_by.values(), key=lambda report: report.seconds)
        step = longest.steps[longest.bound_by]
        return (
            f", bound by {WORDS.get(step.name, step.name)} (busy for {step.busy_seconds:.3f} s of "
            f"the {longest.seconds:.3f} s of a way back)"
        )


def peak_memory() -> str:
    """The most memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    said = f"{format_bytes(host)} of host memory, pages of the model's files with it"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        said = f"{format_bytes(torch.cuda.max_memory_allocated())} of device memory, {said}"
    return f"at most {said}"
