"""Which step of a pass lives in which tier, from byte budgets, and the predicted seconds. Pure.

A *step* is one hand-out of a pass: a layer, or a row range of a tail tensor. It lives on its
device for good, in host memory (and is copied each pass), or on disk (and is read and copied each
pass). The choice is made once: a cyclic scan defeats every cache that decides as it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..errors import ConfigError
from .budget import MAX_BYTES, format_bytes
from .residency import Candidate, Memory, choose_residents

Tier: TypeAlias = Literal["device", "host", "disk"]
"""Where a step lives. On a unified device (the CPU), what is resident is in "device"."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """What one step takes in each place, bytes."""

    device_nbytes: int
    """Resident on its device: cast, aligned."""
    host_nbytes: int
    """In host memory, resident or in a slot: whole pages."""
    read_nbytes: int
    """Read from disk each pass if it lives there."""
    copy_nbytes: int
    """Moved over the link each pass unless it lives on the device."""
    slot_nbytes: int
    """What it needs of a device slot, the cast slot not counted."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be used, bytes."""

    device: tuple[int | None, ...]
    """By device; None: slots as needed, and nothing resident."""
    host: int | None
    """For all devices together; None: slots as needed, and nothing resident."""
    device_slots: int
    """Slots of each device."""
    host_slots: int
    """Host slots of each device, all host pools together."""
    reserve: tuple[int, ...] = ()
    """What of each device's budget is the caller's; nothing of any where it is empty."""
    scratch_nbytes: int = 0
    """The cast slot of each device to which something is streamed."""
    host_slot_nbytes: int | None = None
    """Size of a host slot; None: as large as the largest step that is read."""
    on_host: frozenset[int] = frozenset()
    """Steps that have to be in host memory, whatever the budgets: they are computed there."""
    shared: bool = False
    """True if devices compute in host memory (the CPU): ``host`` limits what they hold, together,
    and there are no host slots."""

    @property
    def limits(self) -> tuple[int | None, ...]:
        """By memory that devices compute in; device i has the one at i modulo their number."""
        return (self.host,) if self.shared else self.device


@dataclass(frozen=True, slots=True)
class Slots:
    """``count`` buffers of ``nbytes`` bytes each."""

    count: int
    nbytes: int

    @property
    def total_nbytes(self) -> int:
        return self.count * self.nbytes


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every step lives, the memory that this takes, and what passes move; bytes.

    Step i is on device i modulo their number. What is needed for a moment to load the residents is
    not in it.
    """

    tiers: tuple[Tier, ...]
    """By step."""
    device_slots: tuple[Slots, ...]
    """By device: no more than it streams steps, none if it streams nothing."""
    host_slots: tuple[Slots, ...]
    """By device: none if no step of it lives on disk. Equally large on all devices. They hold a
    step each, or, where Budget says how large they are, a part of one."""
    device_bytes: tuple[int, ...]
    """By device: residents, slots and cast slot, without the caller's reserve."""
    host_bytes: int
    """Residents and slots in host memory; 0 on a unified device."""
    read_bytes: int
    """A pass, of all devices."""
    copy_bytes: tuple[int, ...]
    """By device, a pass."""
    on_host: frozenset[int] = frozenset()
    """Steps that are computed in host memory, in passes that want it: then they move no byte."""


def place(sizes: Sequence[StepSize], budget: Budget) -> Placement:
    """Where each step of a pass lives, so that as few bytes as possible move each pass.

    Slots are paid first, then residency; where nothing is streamed, no slots are needed. A device
    holds the steps that spare it the most bytes of copies. Host memory, which the devices share,
    holds those of the rest that spare the most bytes of reads. Where devices compute in it, what
    they hold spares reads. Equal steps are spread evenly over the pass, so that neither disk nor
    link sees a burst.

    The choice is exact for few sizes, nearly so for many. Where it is exact, more device memory
    never means more bytes copied, and more host memory never more bytes read. (More device memory
    may mean more bytes read, if sizes differ: what is left may fill host memory less well.)
    Errors: ConfigError if a budget is below its slots, naming it and the bound.
    """
    tiers: list[Tier] = ["host" if i in budget.on_host else "disk" for i in range(len(sizes))]
    _hold_on_devices(sizes, tiers, budget)
    _hold_in_host(sizes, tiers, budget)
    return account(sizes, tiers, budget)


def _hold_on_devices(sizes: Sequence[StepSize], tiers: list[Tier], budget: Budget) -> None:
    limits = budget.limits
    for first, limit in enumerate(limits):
        if limit is None:
            continue
        candidates = dict[int, Candidate]()
        for i in range(first, len(sizes), len(limits)):
            spared = sizes[i].read_nbytes if budget.shared else sizes[i].copy_nbytes
            candidates[i] = Candidate(sizes[i].device_nbytes, spared, sizes[i].slot_nbytes)
            if i in budget.on_host:  # never resident, but passes may stream it: it needs a slot
                candidates[i] = Candidate(2 * MAX_BYTES, 0, sizes[i].slot_nbytes)
        memory = Memory(
            name="device_budget",
            owner=f"device {first}" if len(limits) > 1 else "the device",
            budget=limit,
            slots=budget.device_slots,
            scratch_nbytes=budget.scratch_nbytes,
            reserve=budget.reserve[first] if budget.reserve else 0,
        )
        for i in choose_residents(candidates, len(budget.device), memory):
            tiers[i] = "device"


def _hold_in_host(sizes: Sequence[StepSize], tiers: list[Tier], budget: Budget) -> None:
    if budget.host is None or budget.shared:
        return
    candidates = {
        i: Candidate(size.host_nbytes, size.read_nbytes, size.host_nbytes)
        for i, size in enumerate(sizes)
        if tiers[i] == "disk"
    }
    computed = _computed_nbytes(sizes, budget)
    memory = Memory("host_budget", "the host", budget.host, budget.host_slots, reserve=computed)
    if budget.host_slot_nbytes is not None:
        ring_nbytes = budget.host_slots * budget.host_slot_nbytes
        memory = replace(memory, slots=0, scratch_nbytes=ring_nbytes)
    if computed > budget.host:
        raise ConfigError(
            f"host_budget={budget.host} ({format_bytes(budget.host)}): {len(budget.on_host)} "
            f"host_layers take {computed} bytes ({format_bytes(computed)})"
        )
    for i in choose_residents(candidates, len(budget.device), memory):
        tiers[i] = "host"


def _computed_nbytes(sizes: Sequence[StepSize], budget: Budget) -> int:
    """What steps that are computed in host memory take of it, a slot for their casts included."""
    held = sum(sizes[i].host_nbytes for i in budget.on_host)
    return held + (budget.scratch_nbytes if budget.on_host else 0)


def account(sizes: Sequence[StepSize], tiers: Sequence[Tier], budget: Budget) -> Placement:
    """The placement with these tiers: what it takes, what it moves."""

    def among(steps: range, *wanted: Tier) -> list[StepSize]:
        return [sizes[i] for i in steps if tiers[i] in wanted]

    count, num_memories, whole = len(budget.device), len(budget.limits), range(len(sizes))
    slots, host_slots, device_bytes, copy_bytes = [], [], [], []
    read, kept = among(whole, "disk"), among(whole, "host")
    host_nbytes = budget.host_slot_nbytes or max((size.host_nbytes for size in read), default=0)
    for device in range(count):
        steps = whole[device::count]
        streamed = among(steps, "host", "disk")
        # Devices that share a memory have been charged for slots of one size.
        sharing = among(whole[device % num_memories :: num_memories], "host", "disk")
        largest = max((size.slot_nbytes for size in sharing), default=0)
        slots.append(_slots(min(budget.device_slots, len(streamed)), largest))
        host_slots.append(_slots(budget.host_slots * bool(among(steps, "disk")), host_nbytes))
        resident = sum(size.device_nbytes for size in among(steps, "device"))
        scratch = budget.scratch_nbytes if streamed else 0
        device_bytes.append(resident + slots[-1].total_nbytes + scratch)
        copy_bytes.append(sum(size.copy_nbytes for size in streamed))
    return Placement(
        tiers=tuple(tiers),
        device_slots=tuple(slots),
        host_slots=tuple(host_slots),
        device_bytes=tuple(device_bytes),
        host_bytes=sum(size.host_nbytes for size in kept)
        + (budget.scratch_nbytes if budget.on_host else 0)
        + sum(slots.total_nbytes for slots in host_slots),
        read_bytes=sum(size.read_nbytes for size in read),
        copy_bytes=tuple(copy_bytes),
        on_host=budget.on_host,
    )


def _slots(count: int, nbytes: int) -> Slots:
    return Slots(count, nbytes if count else 0)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second, above 0; None: unknown."""

    read: float | None
    """The disk, past the page cache."""
    copy: tuple[float | None, ...]
    """By device, its link while the others rest."""
    copy_together: float | None = None
    """All links at once, in sum; None: they do not slow each other."""
    cold: float | None = None
    """The disk, through the page cache."""
    cached: float | None = None
    """The page cache."""
    pageable: tuple[float | None, ...] = ()
    """By device, its link from memory that is not page-locked."""
    products: float | None = None
    """Of weights that the processor multiplies by one token, while links are busy."""
    beside: tuple[float | None, ...] = ()
    """By device, its link meanwhile."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """How long a pass takes if nothing but reads and copies takes time."""

    seconds: float
    bound_by: str
    """"read", "copy", or "resident" where nothing is streamed."""
    read_seconds: float
    copy_seconds: float
    read_bytes: int
    """A pass, of all devices."""
    copy_bytes: int


def predict(placement: Placement, rates: Rates) -> Prediction | None:
    """The seconds that a pass takes: reads and copies go on side by side, the slower one counts.

    None if a rate is unknown of a disk or link over which something moves.
    """
    read_bytes, copy_bytes = placement.read_bytes, sum(placement.copy_bytes)
    moves = ((read_bytes, rates.read), *zip(placement.copy_bytes, rates.copy, strict=True))
    if any(nbytes and rate is None for nbytes, rate in moves):
        return None
    read_seconds, *by_link = (nbytes / rate if rate is not None else 0.0 for nbytes, rate in moves)
    if rates.copy_together is not None:
        by_link.append(copy_bytes / rates.copy_together)
    copy_seconds = max(by_link)
    bound_by = "read" if read_seconds >= copy_seconds else "copy"
    return Prediction(
        seconds=max(read_seconds, copy_seconds),
        bound_by=bound_by if read_bytes or copy_bytes else "resident",
        read_seconds=read_seconds,
        copy_seconds=copy_seconds,
        read_bytes=read_bytes,
        copy_bytes=copy_bytes,
    )
