"""Make the benchmark page's tables and picture from what measure.py wrote.

    python docs/benchmarks/tables.py docs/benchmarks/results.jsonl

Prints the tables as Markdown and draws docs/benchmarks/passes.svg (matplotlib).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

PICTURE = Path(__file__).with_name("passes.svg")
HEADINGS = (
    "regime",
    "s a pass",
    "spread",
    "limit, s",
    "share",
    "bound by",
    "device MiB",
    "disk GB",
)


def load(path: Path) -> list[dict[str, Any]]:
    """The records; of a regime that was measured again in the same kind of machine, the last."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records[record["regime"], len(record["machine"]["gpus"])] = record
    return list(records.values())


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table of passes."""
    seconds = record["pass_seconds"]
    spread = (max(seconds) - min(seconds)) / record["seconds_per_pass"]
    disk = record["disk_bytes_per_pass"]
    return (
        record["regime"],
        f"{record['seconds_per_pass']:.4f}",
        f"{spread:.1%}",
        f"{record['limit_seconds']:.4f}",
        f"{record['share_of_limit']:.1%}",
        record["bound_by"],
        f"{record['peak_device_bytes'] / 2**20:,.0f}",
        f"{disk / 1e9:.3f}" if disk else "0",
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown; the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * (len(HEADINGS) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def disk_table(records: list[dict[str, Any]]) -> str:
    """Passes that read, beside raw reads into a small buffer and into memory like the slots'."""
    lines = ["| regime | s a pass | raw reads, s | spread over memory, s | share of these |"]
    lines.append("|---" + "|--:" * 4 + "|")
    for record in records:
        for spread in record["comparisons"].values():
            raw, same = median(record["limits"]["read"]), median(spread)
            cells = [record["regime"], f"{record['seconds_per_pass']:.3f}", f"{raw:.3f}"]
            cells += [f"{same:.3f}", f"{same / record['seconds_per_pass']:.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(record: dict[str, Any]) -> str:
    """Where a record was measured."""
    machine = record["machine"]
    gpus = machine["gpus"]
    return (
        f"{len(gpus)} x {gpus[0] if gpus else 'no GPU'}, {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB, Linux {machine['kernel']}, "
        f"torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['measured_at']}"
    )


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Seconds a pass against the device memory that it took, with the limits."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "layer-streamer"
    from matplotlib import pyplot

    points = sorted(
        (r["peak_device_bytes"] / 2**30, r["seconds_per_pass"], r["limit_seconds"])
        for r in records
        if r["regime"].startswith("device budget") or r["regime"] == "mapped"
    )
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    memory = [point[0] for point in points]
    axes.plot(memory, [point[2] for point in points], color="0.6", label="limit, same run")
    axes.plot(memory, [point[1] for point in points], "o", color="tab:blue", label="layer-streamer")
    axes.set_xlabel("peak device memory, GiB")
    axes.set_ylabel("seconds a pass")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Print the tables; draw the picture."""
    records = load(Path(sys.argv[1]))
    passes = [record for record in records if "pass_seconds" in record]
    for count in sorted({len(record["machine"]["gpus"]) for record in passes}):
        chosen = [r for r in passes if len(r["machine"]["gpus"]) == count]
        print(
            describe(chosen[-1]), table([row(record) for record in chosen]), sep="\n\n", end="\n\n"
        )
    print(disk_table(passes), end="\n\n")
    for record in records:
        if "pass_seconds" not in record:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            print(f"* {record['regime']}: {shown}")
    draw([r for r in passes if len(r["machine"]["gpus"]) == 1], PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
