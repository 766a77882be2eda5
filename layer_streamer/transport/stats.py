"""Where a pass's time went: what each step moved, how long it was busy, how long it stood still.

Times come from the host's monotonic clock for reads and memcpys, and from the device's own events
for copies and compute. The clock of a pass is filled by the pipeline's threads without a wait; it
is read only when somebody asks for the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..machine.atomic import write_atomically


@dataclass(frozen=True, slots=True)
class Span:
    """One layer's time in one step, seconds since the pass began (before it: negative)."""

    layer_idx: int
    """The layer's index in the checkpoint."""
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step (read, memcpy, copy, host or compute) did for one pass."""

    name: str
    """"read", "memcpy", "copy"; "host": computing in host memory, "compute": all other."""
    bytes: int
    """Bytes it moved for this pass (host, compute: bytes of weights it was given)."""
    busy_seconds: float
    """Time in which it worked on at least one layer of this pass, prefetch included."""
    stalled_seconds: float
    """Time since the pass began in which it stood still between layers: no input or no slot."""
    spans: tuple[Span, ...] = field(repr=False)
    """When it worked on which layer, on the timeline of the pass."""

    @property
    def gb_per_s(self) -> float:
        """Bytes over busy seconds, in 1e9 bytes a second; 0 if it moved nothing."""
        return self.bytes / self.busy_seconds / 1e9 if self.busy_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PassReport:
    """Where the time of one finished pass went. ``str()`` of it is a table."""

    seconds: float
    """From the pass's begin to the end of its last layer's compute, on the device's clock."""
    num_layers: int
    """Layers (and tail steps) handed out."""
    steps: Mapping[str, StepReport]
    """By name, for the steps that this configuration has."""
    peak_slots: Mapping[str, tuple[int, int]]
    """Pool name -> (most slots in use at once, slots it has)."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """By step, the bytes a second that ``probe`` measured to be possible here, if it has."""

    def share_of_limit(self, name: str) -> float | None:
        """Rate of a step over what the hardware was measured to be capable of; None: unknown."""
        if name not in self.limits or name not in self.steps:
            return None
        return self.steps[name].gb_per_s * 1e9 / self.limits[name]

    @property
    def bound_by(self) -> str:
        """The step that was busy longest: making any other one faster would not help."""
        return max(self.steps.values(), key=lambda step: step.busy_seconds).name

    def __str__(self) -> str:
        lines = [
            f"pass of {self.num_layers} layers: {self.seconds:.4f} s, bound by {self.bound_by}",
            f"  {'step':<8} {'GB':>9} {'busy s':>9} {'stalled s':>9} {'GB/s':>8}",
        ]
        for step in self.steps.values():
            lines.append(
                f"  {step.name:<8} {step.bytes / 1e9:>9.3f} {step.busy_seconds:>9.4f} "
                f"{step.stalled_seconds:>9.4f} {step.gb_per_s:>8.2f}{self._share(step.name)}"
            )
        used = ", ".join(f"{pool} {peak} of {n}" for pool, (peak, n) in self.peak_slots.items())
        lines.append(f"  slots in use at most: {used}")
        return "\n".join(lines)

    def _share(self, name: str) -> str:
        share = self.share_of_limit(name)
        return f"  ({share:.0%} of the limit)" if share is not None else ""

    def timeline(self) -> dict[str, object]:
        """The pass in Chrome's trace-event format, for https://ui.perfetto.dev."""
        start = min((s.begin for step in self.steps.values() for s in step.spans), default=0.0)
        events: list[dict[str, object]] = []
        rows = [(step.name, row) for step in self.steps.values() for row in _rows(step.spans)]
        for tid, (cat, row) in enumerate(rows, start=1):
            place = {"pid": 1, "tid": tid}
            row_name = {"name": f"{tid} {cat}"}
            events.append({"ph": "M", "name": "thread_name", **place, "args": row_name})
            for span in row:
                name = f"layer {span.layer_idx}"
                when = {"ts": (span.begin - start) * 1e6, "dur": (span.end - span.begin) * 1e6}
                events.append({"ph": "X", "name": name, "cat": cat, **place, **when})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save_timeline(self, path: str | Path) -> None:
        """Write :meth:`timeline` as JSON to ``path``, atomically."""
        write_atomically(Path(path), json.dumps(self.timeline()))


def report_step(name: str, nbytes: int, spans: Sequence[Span], begin: float = 0.0) -> StepReport:
    """Busy and stalled time of a step from its layers' spans (which may overlap).

    ``begin`` is when the pass began where the step runs: a device that is behind begins later.
    """
    busy = stalled = 0.0
    end = float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        stalled += max(0.0, span.begin - max(end, begin))
        busy += max(0.0, span.end - max(span.begin, end))
        end = max(end, span.end)
    return StepReport(name, nbytes, busy, stalled, tuple(spans))


def _rows(spans: Iterable[Span]) -> list[list[Span]]:
    """Spread overlapping spans over as few rows as hold them side by side."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.begin):
        for row in rows:
            if row[-1].end <= span.begin:
                row.append(span)
                break
        else:
            rows.append([span])
    return rows
