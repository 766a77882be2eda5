"""A timed run: passes of a synthetic load beside what the hardware alone needs for the same bytes.

Limit and passes are measured in turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeAlias

import torch

from ..errors import ConfigError
from ..streamer import LayerStreamer, pipeline_of
from .footprint import bytes_from_disk, device_peak, host_peak, reset_device_peak
from .limit_set import READS, Measures, open_limits
from .rawspeed import Load, synchronize
from .threads import leave_a_core

DRIFT = 0.05
"""A pass is not counted if the limit before and after it differ by more than this."""
MOST_TRIES = 3
"""So many times as many passes as are wanted are timed at most, in place of those that drifted."""
Show: TypeAlias = Callable[[str, int | None], object]
"""Called as each measurement begins, with its name and their number (None: not known yet)."""
Measured: TypeAlias = dict[str, list[float]]
"""By name, seconds."""
PREPARATIONS = 3
"""Measurements before those that are counted by passes and limits."""
SETTLE_SECONDS = 0.02
"""Between two looks at whether prefetch has ended."""
REST_SECONDS = 1.0
"""Of the disk, before cold passes and the raw reads beside them alike: storage whose rate is kept
by an allowance that fills up again serves whoever comes after a rest faster. The limits without
reads are measured meanwhile."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: ``passes`` passes of a load of ``tokens`` vectors (0: no compute)."""

    passes: int = 5
    """That count: in place of one whose limit drifted, another is timed. See MOST_TRIES."""
    tokens: int = 1
    cold: bool = False
    """Each pass begins with nothing prefetched; else right after an untimed one."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ConfigError(f"passes={self.passes}: must be at least 1")
        if self.tokens < 0:
            raise ConfigError(f"tokens={self.tokens}: must be at least 0")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured. Seconds and ratios are medians."""

    seconds_per_pass: float
    limit_seconds: float
    share_of_limit: float
    """Of limit over pass, each pair measured in turn; of all together, if every pair drifted."""
    bound_by: str
    """Which limit is the longest: "read", "copy", "compute"; or "none"."""
    peak_device_bytes: int
    """Most memory that torch had allocated on one device during passes."""
    peak_host_bytes: int
    """Most memory that the process had in use (resident), the mapped page cache included."""
    disk_bytes_per_pass: float | None
    """Bytes that the process had fetched from storage; None where the system does not tell."""
    open_seconds: float
    pass_seconds: tuple[float, ...]
    limits: dict[str, tuple[float, ...]]
    """By name, the seconds of each limit; before the first pass and after each."""
    comparisons: dict[str, tuple[float, ...]]
    """The same of what is no limit but helps to understand the passes."""
    shares: tuple[float, ...]
    """Of the pairs that count."""
    dropped: int
    """Pairs that drifted by more than DRIFT."""
    stalled_seconds: dict[str, float]
    """By step, of the last pass."""
    slots: int
    """Bytes that the streamer says it holds on its devices."""
    host: int
    """The same in host memory."""
    plan: str
    report: str

    def __str__(self) -> str:
        spread = (max(self.pass_seconds) - min(self.pass_seconds)) / self.seconds_per_pass
        disk = "unknown"
        if self.disk_bytes_per_pass is not None:
            disk = f"{self.disk_bytes_per_pass / 1e9:.3f} GB"
        return "\n".join(
            (
                self.plan,
                f"{self.seconds_per_pass:.4f} s a pass (median of {len(self.pass_seconds)}, "
                f"spread {spread:.1%}), {self.share_of_limit:.1%} of the limit of "
                f"{self.limit_seconds:.4f} s, bound by {self.bound_by}"
                + (f"; {self.dropped} pairs dropped for drift" if self.dropped else ""),
                *(f"{name} alone: {median(t):.4f} s" for name, t in self.comparisons.items()),
                f"peak: {self.peak_device_bytes / 2**20:,.0f} MiB on a device, "
                f"{self.peak_host_bytes / 2**20:,.0f} MiB in host memory; disk: {disk} a pass; "
                f"opened in {self.open_seconds:.2f} s",
                self.report,
            )
        )

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def run_bench(
    open_streamer: Callable[[], LayerStreamer],
    bench: Bench,
    show: Show = lambda name, total: None,
) -> Outcome:
    """Open a streamer and measure it; torch leaves it a core. Raises what opening and passes do."""
    begin = time.perf_counter()
    with leave_a_core(), open_streamer() as streamer, ExitStack() as stack:
        open_seconds = time.perf_counter() - begin
        load = Load(bench.tokens)
        run = _Runner(streamer, load, bench)
        reset_device_peak(streamer.devices)
        show("warming up", None)
        run.warm_up()
        show("bytes from disk", None)
        disk = run.disk_bytes_per_pass()
        peak = device_peak(streamer.devices)
        show("preparing the limits", None)
        run.settle()
        limits, comparisons = open_limits(streamer, load, stack, cold=bench.cold)
        run.disk_was_read()
        seconds, taken = _measure_in_turn(run, limits, comparisons, bench.passes, show)
        measured = {name: taken[name] for name in limits}
        report = streamer.last_pass
        assert report is not None
        shares, dropped = _pair(seconds, measured)
        medians = {name: median(values) for name, values in measured.items()}
        limit = max(medians.values(), default=0.0)
        return Outcome(
            seconds_per_pass=median(seconds),
            limit_seconds=limit,
            share_of_limit=median(shares) if shares else limit / median(seconds),
            bound_by=max(medians, key=lambda name: medians[name], default="none"),
            peak_device_bytes=peak,
            peak_host_bytes=host_peak(),
            disk_bytes_per_pass=disk,
            open_seconds=open_seconds,
            pass_seconds=tuple(seconds),
            limits={name: tuple(values) for name, values in measured.items()},
            comparisons={name: tuple(taken[name]) for name in comparisons},
            shares=tuple(shares),
            dropped=dropped,
            stalled_seconds={name: step.stalled_seconds for name, step in report.steps.items()},
            slots=streamer.memory.device_bytes,
            host=streamer.memory.host_bytes,
            plan=str(streamer.plan),
            report=str(report),
        )


class _Runner:
    """Passes of one streamer, as a bench wants them."""

    def __init__(self, streamer: LayerStreamer, load: Load, bench: Bench) -> None:
        self._streamer = streamer
        self._load = load
        self._bench = bench
        self._x = torch.zeros(1, dtype=torch.float32, device=streamer.device)
        self._prefetches = False
        self._disk_rests_since = 0.0

    def warm_up(self) -> None:
        """Two passes: the first finds slots empty, the second is as all later ones are."""
        for _ in range(2):
            self._run()

    def timed(self) -> float:
        """Seconds of a pass, from its begin to the end of its last work on the device."""
        if self._bench.cold:
            self.settle()
            self.rest()
            discard_prefetched(self._streamer)
        else:
            self._run()
        begin = time.perf_counter()
        self._run()
        return time.perf_counter() - begin

    def disk_bytes_per_pass(self) -> float | None:
        """Of ``bench.passes`` passes in a row. Prefetch is as far ahead after them as before."""
        before = bytes_from_disk()
        for _ in range(self._bench.passes):
            self._run()
        after = bytes_from_disk()
        if before is None or after is None:
            return None
        return (after - before) / self._bench.passes

    def settle(self) -> None:
        """Wait until what is prefetched after a pass is there, and disk and links are at rest."""
        settle(self._streamer)
        if self._prefetches:
            self._prefetches = False
            self.disk_was_read()

    def rest(self) -> None:
        """If passes begin cold, wait until the disk was at rest for REST_SECONDS."""
        if self._bench.cold:
            until = self._disk_rests_since + REST_SECONDS
            time.sleep(max(0.0, until - time.perf_counter()))

    def disk_was_read(self) -> None:
        """The disk's rest begins."""
        self._disk_rests_since = time.perf_counter()

    def _run(self) -> None:
        self._streamer.run_pass(self._x, self._load)
        for device in self._streamer.devices:
            synchronize(device)
        self._prefetches = True


def _measure_in_turn(
    run: _Runner, limits: Measures, comparisons: Measures, passes: int, show: Show
) -> tuple[list[float], Measured]:
    """Seconds of each pass, and by name those of both kinds before the first and after each."""
    measures = limits | comparisons
    seconds, taken, wanted = list[float](), Measured({name: [] for name in measures}), passes

    def total() -> int:
        return PREPARATIONS + wanted + len(measures) * (wanted + 1)

    def measure_beside() -> None:
        for name, measure in measures.items():
            show(f"alone: {name}", total())
            # Prefetch goes on after a pass, over the same disk and link.
            run.settle()
            if name in READS:
                run.rest()
            taken[name].append(measure())
            if name in READS:
                run.disk_was_read()

    measure_beside()
    while len(seconds) < wanted:
        show(f"pass {len(seconds) + 1}", total())
        seconds.append(run.timed())
        measure_beside()
        _, dropped = _pair(seconds, {name: taken[name] for name in limits})
        wanted = min(passes + dropped, MOST_TRIES * passes)
    return seconds, taken


def settle(streamer: LayerStreamer) -> None:
    """Wait until prefetch has filled every slot, and disk and links are at rest."""
    pipeline = pipeline_of(streamer)
    quiet = 0
    while quiet < 2:
        # A stage that has been woken may be about to begin: looked at twice.
        busy = any(lane.reader is not None and not lane.reader.idle() for lane in pipeline.lanes)
        quiet = 0 if busy else quiet + 1
        time.sleep(SETTLE_SECONDS)
    for device in pipeline.devices:
        device.wait_idle()


def discard_prefetched(streamer: LayerStreamer) -> None:
    """Begin a pass and leave it: what was prefetched is dropped, reading starts at layer 0."""
    sweep = streamer.sweep()
    next(sweep)
    sweep.close()


def _pair(
    seconds: Sequence[float], limits: Mapping[str, Sequence[float]]
) -> tuple[list[float], int]:
    """Share of the limit of each pass, and how many are left out because the limit drifted.

    The limit of a pass is the mean of those measured before and after it.
    """
    shares, dropped = [], 0
    for i, elapsed in enumerate(seconds):
        before = max((values[i] for values in limits.values()), default=0.0)
        after = max((values[i + 1] for values in limits.values()), default=0.0)
        if abs(before - after) > DRIFT * max(before, after):
            dropped += 1
        else:
            shares.append((before + after) / 2 / elapsed)
    return shares, dropped
