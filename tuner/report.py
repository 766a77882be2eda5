"""A tune's results for people: a table, and a picture of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine.atomic import write_atomically
from ..planning.budget import format_bytes
from .progress import first_line, format_parts, format_settings
from .search.space import AXES
from .trials.record import TrialRecord

TABLE, PICTURE = "tune.md", "tune.png"
MOST_DETAIL = 100
MOST_BARS = 60
"""Candidates that the first part of the picture shows, the fastest ones."""
WIDEST_LINEAR = 5.0
"""Times that are further apart than this, slowest over fastest, are drawn on a logarithmic axis."""
BYTE_SETTINGS = ("read_chunk", "device_budget", "host_budget")


@dataclass(frozen=True, slots=True)
class Findings:
    """What a report is made of."""

    title: str
    records: Sequence[TrialRecord]
    best: TrialRecord | None
    num_untried: int
    """Candidates that were left out as hopeless, or for want of time."""


def write_report(folder: Path, findings: Findings) -> tuple[Path, ...]:
    """Write the table and the picture into ``folder``, which is made if need be; their paths.

    Raises OSError, and ImportError without matplotlib: then the table is there all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / TABLE
    write_atomically(table, make_table(findings))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the picture needs matplotlib (pip install 'layer-streamer[report]'); the table is "
            f"in {table}"
        ) from error
    rows = min(len(_well(findings.records)), MOST_BARS)
    figure = Figure(figsize=(13, max(5, 0.16 * rows + 1)), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(findings.title)
    _draw_times(left, findings)
    _draw_memory(right, findings)
    if is_wide(findings.records):
        left.set_xscale("log")
        right.set_yscale("log")
    picture = folder / PICTURE
    figure.savefig(picture, dpi=120)
    return table, picture


def make_table(findings: Findings) -> str:
    """The table as Markdown: those that ended well by their time, then the others."""
    best = findings.best
    lines = [f"# {findings.title}", ""]
    if best is not None:
        lines += [f"Best: `{format_settings(best.settings)}`, {best.seconds:.4f} s a run.", ""]
    if findings.num_untried:
        lines += [f"{findings.num_untried} candidates were not tried.", ""]
    lines += [
        "| s a run | slowest, fastest run | to the best | device | host | ending | settings |",
        "|---:|---:|---:|---:|---:|---|---|",
    ]
    well = sorted(_well(findings.records), key=lambda record: record.seconds or 0.0)
    others = [record for record in findings.records if record.seconds is None]
    lines += [_row(record, best) for record in (*well, *others)]
    return "\n".join(lines) + "\n"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (bytes, seconds), those that no other one beats in both; by rising bytes."""
    found: list[tuple[float, float]] = []
    for nbytes, seconds in sorted(points):
        if not found or seconds < found[-1][1]:
            found.append((nbytes, seconds))
    return found


def is_wide(records: Sequence[TrialRecord]) -> bool:
    """True: on one linear axis the fastest candidates would look alike."""
    times = [record.seconds for record in records if record.seconds]
    return bool(times) and max(times) > WIDEST_LINEAR * min(times)


def _well(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.seconds is not None]


def _row(record: TrialRecord, best: TrialRecord | None) -> str:
    lines = (format_parts(record), first_line(record.detail))
    detail = "; ".join(line for line in lines if line)
    if len(detail) > MOST_DETAIL:
        detail = detail[:MOST_DETAIL].rsplit(" ", 1)[0] + " ..."
    ending = f"{record.ending}: {detail}" if detail else record.ending
    times = ["", "", ""]
    if record.seconds is not None:
        slowest, fastest = max(record.run_seconds), min(record.run_seconds)
        times[:2] = f"{record.seconds:.4f}", f"{slowest:.4f}, {fastest:.4f}"
        if best is not None and best.seconds:
            times[2] = f"{record.seconds / best.seconds - 1:+.1%}"
    peaks = (record.peak_device_bytes, record.peak_host_bytes)
    memory = [format_bytes(nbytes) if nbytes else "" for nbytes in peaks]
    # A bar would end the cell.
    cells = [*times, *memory, ending, f"`{format_settings(record.settings)}`"]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _draw_times(axes: Any, findings: Findings) -> None:
    """Seconds by candidate, with the range of its runs, the fastest at the top."""
    well = sorted(_well(findings.records), key=lambda record: record.seconds or 0.0)[:MOST_BARS]
    for row, record in enumerate(well):
        seconds = record.seconds or 0.0
        axes.plot([min(record.run_seconds), max(record.run_seconds)], [row, row], color="0.7")
        axes.plot([seconds], [row], "o", color="C3" if record is findings.best else "C0", ms=4)
    axes.set_yticks(range(len(well)), _names(well), fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("s a run (median, and range)")
    axes.set_title("time by candidate")


def _draw_memory(axes: Any, findings: Findings) -> None:
    """Seconds against the most memory taken, and the frontier of the best ones."""
    well = _well(findings.records)
    memory = "device" if any(record.peak_device_bytes for record in well) else "host"
    points = [(getattr(r, f"peak_{memory}_bytes") / 2**30, r.seconds or 0.0) for r in well]
    axes.plot([x for x, _ in points], [y for _, y in points], "o", color="C0", ms=4)
    best = frontier(points)
    xs, ys = [x for x, _ in best], [y for _, y in best]
    axes.step(xs, ys, "o-", where="post", color="C3", ms=4, label="nothing is faster in less")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"peak {memory} memory (GiB)")
    axes.set_ylabel("s a run")
    axes.set_title("time against memory")
    if points:
        axes.legend()


def _names(records: Sequence[TrialRecord]) -> list[str]:
    """By record, the settings in which they differ."""
    differing = [name for name in AXES if len({r.settings.get(name) for r in records}) > 1]
    return [
        " ".join(f"{n}={_shown(n, r.settings[n])}" for n in differing if n in r.settings)
        for r in records
    ]


def _shown(name: str, value: Any) -> str:
    return format_bytes(value) if name in BYTE_SETTINGS and value is not None else str(value)
