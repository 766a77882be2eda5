"""Predicted seconds of a run: for the order of trials, and for what cannot be beaten. Pure.

A pass is predicted from its plan: bytes over rates for reads, memcpys and copies, and the seconds
of compute. Two steps with enough slots between them work side by side, and the longer one counts;
with too few they take turns. The rates are those that a probe has put on record, else guesses of
which only the ratios matter; trials put the compute, and what their own steps needed, in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...machine.limits import MachineLimits
from ..trials.record import CacheState, TrialRecord
from .screen import Planned

Class = tuple[str, str, int, int, bool]
"""What the speed of a step depends on: its name, mode, threads, and bytes a read (or zeros), and
whether reads go into a ring, which stays in the processor's cache."""

THERE: Class = ("host", "", 0, 0, False)
"""What the processor computes."""
READ_RATES = {"direct": 3e9, "cold": 2e9, "warm": 10e9}
"""Bytes a second of DEFAULT_READ_THREADS threads, where nothing is on record."""
COPY_RATES = {"pinned": 20e9, "mapped": 20e9, "pageable": 6e9}
MEMCPY_RATE = 8e9
PRODUCT_RATE = 15e9
"""Weights that the processor takes in beside copies: on the hosts measured from a half to more than
all of what these bring, by cores (docs/benchmarks)."""
INTO_POOLS = 0.8
"""Reads into slots that hold layers, compared with reads into a ring."""
PART_SECONDS = 1e-4
"""What one part's way through a ring costs beside its bytes; parts are handed over one by one."""
COMPUTE_RATES = {True: 10e9, False: 1e12}
"""Weights that compute takes in, until a trial has told; on the CPU (True), on other devices."""
LEAST_SHARE = 1 / 8
"""Trials in which the device computed with less than this tell no more of its compute."""
JITTER = 0.02
"""What a pass loses at a hand-over between two steps with one slot ahead; less with more."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of this machine's speed."""

    cache: CacheState
    limits: MachineLimits | None
    unified: bool
    seconds_per_byte: Mapping[Class, float] = field(default_factory=dict)
    """By class of step, what trials needed: an upper bound on what the hardware needs."""
    compute_seconds: float | None = None
    """Of a run; None: no trial has told."""
    passes: float = 1.0
    """Of a run."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass of a candidate moves, bytes."""

    read: float
    memcpy: float
    copy: float
    compute: float
    """Of weights, on the device."""
    read_class: Class
    copy_class: Class
    overlaps: tuple[float, ...]
    """Of reads and memcpys, of these and copies, of these and compute: 0 by turns (there is room
    for one batch alone), 1 at once (one can be filled while another is used)."""
    jitter: float
    there: float = 0.0
    """Of weights, by the processor: of host layers, which are not copied."""

    @property
    def share(self) -> float:
        """The part of the weights that the device computes with."""
        return self.compute / (self.compute + self.there) if self.there else 1.0


def work_of(planned: Planned) -> Work:
    """What one pass moves, and how far its steps overlap."""
    plan, slots, batches = planned.plan, planned.slots, planned.batches
    unified = plan.machine.unified
    read = plan.placement.read_bytes
    staged = "pinned" in slots and "host" in slots
    pinned = "host" not in slots or staged
    depths = (
        slots["host"] / batches.read if staged else math.inf,
        # Of the last pool in host memory, for each batch that the copier takes out of it.
        slots.get("pinned", slots.get("host", math.inf))
        / (batches.staged if staged else batches.read),
        slots["device"] / (batches.read if unified else batches.copied) or math.inf,
    )
    source = ("mapped" if plan.read_mode == "mapped" else "pinned") if pinned else "pageable"
    return Work(
        read=read,
        memcpy=read if staged else 0,
        # Devices copy side by side: the one with the most to copy counts.
        copy=0.0 if unified else float(max(plan.copied_beside)),
        compute=sum(size.copy_nbytes for size in plan.sizes) - plan.computed_there,
        read_class=("read", plan.read_mode, plan.read_threads, plan.read_chunk, "ring" in slots),
        copy_class=("copy", source, 0, 0, False),
        overlaps=tuple(min(max(depth - 1, 0.0), 1.0) for depth in depths),
        jitter=sum(JITTER / depth for depth in depths),
        there=plan.computed_there,
    )


def predict_seconds(work: Work, costs: Costs) -> float:
    """Seconds of a run of that candidate."""
    passes = costs.passes
    compute = costs.compute_seconds
    if compute is None:
        compute = passes * work.compute / COMPUTE_RATES[costs.unified]
    else:
        compute *= work.share
    # The device waits for what the processor computes; the link does not.
    compute += passes * work.there * _seconds_per_byte(THERE, costs)
    parts = (
        passes * work.read * _seconds_per_byte(work.read_class, costs),
        passes * work.memcpy / ((costs.limits and costs.limits.memcpy_rate) or MEMCPY_RATE),
        passes * work.copy * _seconds_per_byte(work.copy_class, costs),
        compute,
    )
    total = parts[0]
    for seconds, overlap in zip(parts[1:], work.overlaps, strict=True):
        total = max(total, seconds) + (1 - overlap) * min(total, seconds)
    return max(total, 1e-9) * (1 + work.jitter)


def floor_seconds(work: Work, costs: Costs) -> float:
    """Seconds below which no run of that candidate can be, as far as is known; 0: nothing is.

    Each step has to move its bytes, at no more than the best rate that a trial of its class has
    shown, or that a probe has measured; and the compute has to be done. On the CPU nothing is
    known: reads and compute take the cores from each other, so settings change both.
    """
    if costs.unified:
        return 0.0
    floor = (costs.compute_seconds or 0.0) * work.share
    for kind, nbytes in ((work.read_class, work.read), (work.copy_class, work.copy)):
        known = costs.seconds_per_byte.get(kind)
        if known is None and costs.compute_seconds is not None:
            rate = _rate_on_record(kind, costs, fastest=True)
            known = 1 / rate if rate is not None else None
        if known is not None:
            floor = max(floor, costs.passes * nbytes * known)
    return floor


def learn(costs: Costs, trials: Iterable[tuple[Work, TrialRecord]]) -> Costs:
    """The same with what trials that ended well have shown.

    A run's time less that in which a step stood still is what the step needed, at most.
    """
    shown, compute, passes = dict(costs.seconds_per_byte), costs.compute_seconds, costs.passes
    for work, record in trials:
        if not record.run_seconds or record.pass_seconds <= 0:
            continue
        run = record.run_seconds[-1]
        # What a run does beside its passes counts as a part of one: it is in every candidate's.
        passes = max(run / record.pass_seconds, 1.0)
        needed = _needed(record, "compute") / max(work.share, LEAST_SHARE)
        compute = needed if compute is None else min(compute, needed)
        moved = (work.read_class, work.read), (work.copy_class, work.copy), (THERE, work.there)
        for kind, nbytes in moved:
            if nbytes and record.step_bytes.get(kind[0]):
                each = _needed(record, kind[0]) / (passes * nbytes)
                shown[kind] = min(shown.get(kind, each), each)
    return replace(costs, seconds_per_byte=shown, compute_seconds=compute, passes=passes)


def _needed(record: TrialRecord, step: str) -> float:
    """Seconds of a run in which a step did not stand still, from the run's last pass."""
    share = 1 - record.stalled_seconds.get(step, 0.0) / record.pass_seconds
    return record.run_seconds[-1] * min(max(share, 0.0), 1.0)


def _seconds_per_byte(kind: Class, costs: Costs) -> float:
    """What trials of that class have shown, else a guess.

    Guesses are as far off as the best of the trials says, or what was tried would look better than
    what was not: copies share a link, reads in one mode share a disk or the page cache.
    """
    shown = costs.seconds_per_byte.get(kind)
    if shown is not None:
        return shown
    related = (
        seconds / _guess(other, costs)
        for other, seconds in costs.seconds_per_byte.items()
        if other[0] == kind[0] and (kind[0] == "copy" or other[1] == kind[1])
    )
    return _guess(kind, costs) * min(related, default=1.0)


def _guess(kind: Class, costs: Costs) -> float:
    """Seconds a byte before any trial."""
    rate = _rate_on_record(kind, costs)
    name, mode, threads, chunk, ring = kind
    if name == "copy":
        return 1 / (rate if rate is not None else COPY_RATES[mode])
    if name == "host":
        return 1 / (rate if rate is not None else PRODUCT_RATE)
    if rate is None:
        way = "direct" if mode == "direct" else costs.cache
        # More threads help less and less; small reads cost a call each.
        threads_help = 1.5 * threads / (threads + 4)
        chunk_helps = chunk / (chunk + (256 << 10))
        rate = READ_RATES[way] * threads_help * chunk_helps
    if costs.unified:
        return 1 / rate
    return max(1 / rate, PART_SECONDS / chunk) if ring else 1 / (rate * INTO_POOLS)


def _rate_on_record(kind: Class, costs: Costs, *, fastest: bool = False) -> float | None:
    """Bytes a second that a probe has measured for the class of step that is nearest to ``kind``.

    ``fastest``: with any number of threads, and bytes a read.
    """
    limits = costs.limits
    if limits is None:
        return None
    name, mode, threads, chunk, _ = kind
    devices = limits.machine.devices
    if name == "host":
        known = (limits.product_rate(device.device) for device in devices)
        return min((rate.bytes_per_s for rate in known if rate is not None), default=None)
    if name == "copy":
        pinned = [rate.bytes_per_s for device in devices for rate in device.copies]
        pageable = [device.pageable for device in devices]
        return max(pageable if mode == "pageable" else pinned, default=None)
    if limits.disk is None:
        return None
    if mode != "direct" and costs.cache == "warm":
        rates = [(r.bytes_per_s, r.threads, chunk) for r in limits.disk.cached_reads]
    else:
        way = "direct" if mode == "direct" else "cold"
        reads = limits.disk.reads
        rates = [(r.bytes_per_s, r.threads, r.chunk_nbytes) for r in reads if r.mode == way]
    if fastest:
        return max((rate[0] for rate in rates), default=None)

    def distance(rate: tuple[float, int, int]) -> float:
        return abs(math.log(rate[1] / threads)) + abs(math.log(rate[2] / chunk))

    return min(rates, key=distance)[0] if rates else None
