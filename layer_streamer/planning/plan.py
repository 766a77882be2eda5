"""What a streamer will do with a checkpoint on a machine: tiers, read mode, predicted time. Pure.

The machine's side comes in as numbers, so that a plan can be made for a machine that is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .budget import format_bytes
from .placement import Placement, Prediction, Rates, StepSize, Tier

CACHED = 0.9
"""Files of which this share is in the page cache count as cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a plan needs to know of a machine."""

    devices: tuple[str, ...]
    unified: bool
    """True if the device computes in host memory (the CPU)."""
    maps_files: bool
    """True if a device can copy from the pages of a mapped file."""
    device_free: tuple[int, ...]
    """Free bytes of each device."""
    host_available: int
    """Bytes of host memory that can be had."""
    rates: Rates
    """What is known of them; what a prediction needs may be missing."""
    readers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By read mode, the (threads, bytes a read) that were measured to be the fastest."""

    def host_nbytes(self, placement: Placement) -> int:
        """What a placement takes of host memory."""
        of_devices = sum(placement.device_bytes) if self.unified else 0
        return placement.host_bytes + of_devices


@dataclass(frozen=True, slots=True)
class ExpertTiers:
    """Where experts live that are brought on demand, beside their slots."""

    layers: tuple[int, ...]
    """Those whose experts are in host memory, in pages of the files."""
    page_bytes: int
    """Of these pages."""
    disk_bytes: int
    """Of the others, which are read as they are asked for."""
    read_mode: str
    """How: "direct", "buffered"; "": none is."""
    reason: str
    """Why so."""

    def __str__(self) -> str:
        parts = list[str]()
        if self.layers:
            some = f" of {len(self.layers)} layers" if self.disk_bytes else ""
            pages = format_bytes(self.page_bytes)
            parts.append(f"experts{some} in host memory: {pages} (the page cache itself)")
        if self.disk_bytes:
            others = "the others" if parts else "experts are"
            nbytes = format_bytes(self.disk_bytes)
            parts.append(
                f"{others} read as they are asked for: {nbytes}, {self.read_mode}: {self.reason}"
            )
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each step lives and how it is read. ``str()`` of it is a table."""

    machine: Machine
    """What it was made for: devices, free bytes, rates."""
    sizes: tuple[StepSize, ...]
    """By step, the bytes that it reads, copies and takes in memory."""
    placement: Placement
    """By step, its tier; the bytes that slots and resident layers take."""
    read_mode: Literal["mapped", "direct", "buffered"]
    """How files are asked to be read; OpenFiles says which of them refused."""
    reason: str
    """Why they are read so."""
    predicted: Prediction | None
    """Seconds a pass, and of its parts; None: a rate that counts is not known."""
    read_threads: int
    """Threads that read, for each device."""
    read_chunk: int
    """Bytes that one thread reads at a stretch."""
    layers: tuple[int, ...]
    """By step, in the order of the pass, its layer's index in the checkpoint (tail steps: from the
    checkpoint's number of layers on)."""
    rates: Rates
    """Of the reads and copies as they are done here: what ``predicted`` went by."""
    cached: float | None = None
    """Share of the files that the page cache had; None: it does not matter, or was not asked."""
    static_bytes: Mapping[str, int] = field(default_factory=dict)
    """By device, bytes of the tensors that ``load_static`` has put there by now."""

    expert_slots: int = 0
    """Experts that are brought on demand: how many the device holds."""
    expert_bytes: int = 0
    """What their slots take of it."""
    expert_tiers: ExpertTiers | None = None
    """Where they come from; None: none is brought on demand."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """By step (its layer: ``layers``): "device" and "host" are resident, "disk" is read each
        pass."""
        return self.placement.tiers

    @property
    def host_layers(self) -> tuple[int, ...]:
        """Layers (indices in the checkpoint) that are handed out in host memory, in passes that
        want it; others copy them to their device, as their tier says."""
        return tuple(self.layers[i] for i in sorted(self.placement.on_host))

    @property
    def predicted_seconds(self) -> float | None:
        """Seconds a pass if only reads and copies take time; None if no rates are known."""
        return self.predicted.seconds if self.predicted is not None else None

    def balanced(self, products: float, links: Sequence[float], num_layers: int) -> int:
        """How many of the layers that this plan, which has no host layers, streams from host memory
        a pass of one token should compute there, so that processor and links end together.

        ``products``: bytes a second of weights that the processor multiplies while links are busy;
        ``links``: by device, what is copied meanwhile. Steps from layer ``num_layers`` on are the
        tail. 0 where a disk holds passes up, and on a CPU.
        """
        if self.machine.unified or "disk" in self.tiers:
            return 0
        steps = zip(self.layers, self.tiers, strict=True)
        streamed = sum(tier == "host" and layer < num_layers for layer, tier in steps)
        return round(streamed * products / (products + sum(links)))

    @property
    def copied_beside(self) -> tuple[int, ...]:
        """By device, bytes that it is sent in a pass that computes host layers where they lie."""
        moved = list(self.placement.copy_bytes)
        for i in self.placement.on_host:
            moved[i % len(moved)] -= self.sizes[i].copy_nbytes
        return tuple(moved)

    @property
    def computed_there(self) -> int:
        """Bytes of weights of the host layers, as far as they would be copied."""
        return sum(self.sizes[i].copy_nbytes for i in self.placement.on_host)

    @property
    def predicted_on_host(self) -> tuple[float, float] | None:
        """Seconds of links and of the processor in a pass of one token that computes the host
        layers where they lie, side by side; None: there are none, layers are read from disk in
        each pass, or it was not measured how fast the two are at once."""
        rates, moved, there = self.machine.rates, self.copied_beside, self.computed_there
        known = len(rates.beside) == len(moved) and None not in rates.beside
        if not there or rates.products is None or not known or "disk" in self.tiers:
            return None
        links = [n / rate for n, rate in zip(moved, rates.beside, strict=True) if rate is not None]
        return max(links), there / rates.products

    @property
    def limits(self) -> dict[str, float]:
        """By step of a byte's way, the measured limit in bytes a second, where it is known.

        Of direct reads alone: what the disk can do is no limit of reads from the page cache, and
        what a probe copied out of that is none either. Such a copy is the faster the more of it
        stays in the processor's caches, which differs from pass to pass.
        """
        rates, limits = self.rates, dict[str, float]()
        together = rates.copy_together
        if together is None and None not in rates.copy:
            together = sum(rate for rate in rates.copy if rate is not None)
        if together is not None and not self.machine.unified:
            limits["copy"] = together
        if self.machine.rates.read is not None and self.read_mode == "direct":
            limits["read"] = self.machine.rates.read
        return limits

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "devices": self.machine.devices,
            "layers": self.layers,
            "tiers": self.tiers,
            "host_layers": self.host_layers,
            "device_bytes": self.placement.device_bytes,
            "host_bytes": self.placement.host_bytes,
            "static_bytes": dict(self.static_bytes),
            "expert_slots": self.expert_slots,
            "expert_bytes": self.expert_bytes,
            "expert_tiers": asdict(self.expert_tiers) if self.expert_tiers is not None else None,
            "read_mode": self.read_mode,
            "read_threads": self.read_threads,
            "read_chunk": self.read_chunk,
            "reason": self.reason,
            "predicted": asdict(self.predicted) if self.predicted is not None else None,
            "predicted_on_host": self.predicted_on_host,
        }

    def unmapped(self, reason: str) -> Plan:
        """The same with an arena instead of mapped files."""
        return replace(self, read_mode="buffered", reason=reason)

    def __str__(self) -> str:
        names = {
            "device": "resident on the device",
            "host": "resident in host memory",
            "disk": "on disk",
        }
        lines = [f"  {'tier':<24} {'layers':>6} {'GB':>8} {'GB read':>8} {'GB copied':>9}  which"]
        for tier, name in names.items():
            of_tier = [i for i, placed in enumerate(self.tiers) if placed == tier]
            if not of_tier:
                continue
            stored = sum(self.sizes[i].read_nbytes for i in of_tier)
            read = stored if tier == "disk" else 0
            copied = sum(self.sizes[i].copy_nbytes for i in of_tier) if tier != "device" else 0
            lines.append(
                f"  {name:<24} {len(of_tier):>6} {stored / 1e9:>8.3f} {read / 1e9:>8.3f} "
                f"{copied / 1e9:>9.3f}  {_ranges(sorted(self.layers[i] for i in of_tier))}"
            )
            if tier == "host" and self.host_layers:
                lines.append(self._computed_there())
        for device, nbytes in zip(self.machine.devices, self.placement.device_bytes, strict=True):
            lines.append(f"  memory on {device}: {format_bytes(nbytes)}")
        if self.expert_bytes:
            lines.append(
                f"  {self.expert_slots} slots of experts: {format_bytes(self.expert_bytes)}"
            )
        if self.expert_tiers is not None:
            lines.append(f"  {self.expert_tiers}")
        if not self.machine.unified:
            kind = " (the page cache itself)" if self.read_mode == "mapped" else ""
            lines.append(f"  host memory: {format_bytes(self.placement.host_bytes)}{kind}")
        for device, nbytes in self.static_bytes.items():
            lines.append(f"  static tensors on {device}: {format_bytes(nbytes)}")
        lines += [
            f"  reads: {self.read_mode}: {self.reason}",
            f"  readers: {self.read_threads} threads x {format_bytes(self.read_chunk)}",
            f"  {self._prediction()}",
        ]
        if (both := self.predicted_on_host) is not None:
            lines.append(
                f"  with {len(self.host_layers)} layers computed in host memory: {max(both):.4f} s "
                f"a pass of one token (links {both[0]:.4f} s, processor {both[1]:.4f} s)"
            )
        return "\n".join(lines)

    def _computed_there(self) -> str:
        nbytes = sum(self.sizes[i].read_nbytes for i in self.placement.on_host)
        return (
            f"  {'of these, computed there':<24} {len(self.host_layers):>6} {nbytes / 1e9:>8.3f} "
            f"{0:>8.3f} {0:>9.3f}  {_ranges(sorted(self.host_layers))}"
        )

    def _prediction(self) -> str:
        if self.predicted is None:
            if self.read_mode == "mapped" and self.machine.unified:
                return "no prediction: how fast a CPU takes pages in is not among the limits"
            return "no prediction: rates are unknown (layer-streamer probe measures them)"
        parts, where = self.predicted, ""
        if self.cached is not None:
            where = f" with {self.cached:.0%} of the files in the page cache"
        return (
            f"predicted: {parts.seconds:.4f} s a pass, bound by {parts.bound_by} "
            f"(read {parts.read_seconds:.4f} s{where}, copy {parts.copy_seconds:.4f} s)"
        )


def _ranges(indices: Sequence[int]) -> str:
    """ "0-3, 7": for people; what is too long is counted."""
    if indices[-1] - indices[0] == len(indices) - 1 > 0:
        return f"{indices[0]}-{indices[-1]}"
    listed = ", ".join(map(str, indices[:12]))
    return listed if len(indices) <= 12 else f"{listed}, ... {indices[-1]}"
