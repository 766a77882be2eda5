"""The autotuner's race beside the exhaustive search over the same candidates, on this machine.

    python examples/make/make_checkpoint.py /tmp/q7cut --shape qwen2.5-7b --layers 4
    python docs/benchmarks/measure_tuner.py /tmp/q7cut OUT [--seconds 500]

The exhaustive search tries every candidate to its end (no killing, no pauses) and may be spread
over several runs: it goes on where it was. Then come the race, and the three best candidates once
more, in turn, which shows how well a trial repeats. OUT/summary.json has the figures, OUT/*/tune.md
and tune.png the reports of both searches. Exit code 3: the exhaustive search is not finished yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from measure import describe_machine

from layer_streamer import LayerStreamerTuner
from layer_streamer.tuner.search.space import make_key
from layer_streamer.tuner.trials.record import TrialLimits, TrialRecord, TrialSpec
from layer_streamer.tuner.trials.trial import run_trial

MIB = 1 << 20
VALUES: dict[str, Any] = {
    "n_gpu_values": [1, 2],
    "n_cpu_pinned_values": [None, 4],
    "read_mode_values": ["mapped", "buffered", "direct"],
    "read_threads_values": [4, 8, 16],
    "read_chunk_values": [MIB, 8 * MIB],
}
"""50 distinct candidates: mapped files use neither host pools nor readers."""
ROUNDS = 3
"""Trials of each of the best candidates, to see how well they repeat."""


def main() -> int:
    """0, or 3 if time was over before the exhaustive search was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="of the exhaustive search, this time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    exhaustive = search(args.path, args.out / "exhaustive", strategy="grid", margin=None,
                        max_seconds=args.seconds)  # fmt: skip
    tried = [record for record in exhaustive.results if record.ending != "pruned"]
    print(f"exhaustive: {len(tried)} trials on record", flush=True)
    if len(tried) < 48:
        return 3
    race = search(args.path, args.out / "race", strategy="race")
    again = repeat(args.path, sorted(tried, key=seconds_of)[:3])
    summary = summarise(tried, race, again)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return 0


def search(path: Path, folder: Path, **options: Any) -> LayerStreamerTuner:
    """A tune with a results file and a report of its own."""
    folder.mkdir(exist_ok=True)
    tuner = LayerStreamerTuner.from_checkpoint(
        path, results_path=folder / "results.jsonl", **VALUES, **options
    )
    begin = time.monotonic()
    best = tuner.tune()
    print(f"{folder.name}: {time.monotonic() - begin:.1f} s, best {best}", flush=True)
    tuner.report(folder)
    return tuner


def repeat(path: Path, records: Sequence[TrialRecord]) -> list[list[float]]:
    """Seconds of ROUNDS more trials of each, in turn."""
    spec = TrialSpec(model={"path": str(path.resolve())}, settings={}, setup_fn=None)
    found: list[list[float]] = [[] for _ in records]
    for _ in range(ROUNDS):
        for times, record in zip(found, records, strict=True):
            again = run_trial(replace(spec, settings=record.settings), TrialLimits())
            times.append(seconds_of(again))
    return found


def summarise(
    tried: Sequence[TrialRecord], race: LayerStreamerTuner, again: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """How the race's best does among all, and what the two searches took."""
    assert race.best is not None
    by_key = {make_key(record.settings, unified=False): record for record in tried}
    chosen = by_key[make_key(race.best.settings, unified=False)]
    best = min(tried, key=seconds_of)
    raced = [record for record in race.results if record.ending != "pruned"]
    spent = [sum(record.trial_seconds for record in records) for records in (tried, raced)]
    return {
        "machine": describe_machine(),
        "candidates": len(tried),
        "exhaustive_seconds": spent[0],
        "race_seconds": spent[1],
        "race_share_of_time": spent[1] / spent[0],
        "race_trials": len(raced),
        "best": dict(best.settings),
        "best_seconds": seconds_of(best),
        "race_best": dict(chosen.settings),
        "race_best_seconds_in_the_exhaustive_search": seconds_of(chosen),
        "loss": seconds_of(chosen) / seconds_of(best) - 1,
        "top_three_again": again,
        "noise": max(max(times) / min(times) - 1 for times in again),
        "top_three_medians": [median(times) for times in again],
        "endings": sorted({record.ending for record in tried}),
    }


def seconds_of(record: TrialRecord) -> float:
    """A trial's result; infinite if it has none."""
    return record.seconds if record.seconds is not None else float("inf")


if __name__ == "__main__":
    sys.exit(main())
