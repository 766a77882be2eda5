"""The memory plan for people: what a budget is spent on, part by part. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layer_streamer import format_bytes

if TYPE_CHECKING:
    from .memory_plan import MemoryPlan

RESIDENT, SLOTS, EXPERTS, SPARE = "resident layers", "slots", "slots of experts", "spare"


def device_parts(plan: MemoryPlan, number: int = 0) -> dict[str, int]:
    """By part, bytes of a device's memory; with a budget, they sum up to it."""
    streamer, own = plan.streamer, dict(plan.devices[number])
    del own["layers"]
    taken = streamer.placement.device_bytes[number]
    steps = range(number, len(streamer.tiers), len(plan.devices))
    resident = sum(streamer.sizes[i].device_nbytes for i in steps if streamer.tiers[i] == "device")
    parts = {RESIDENT: resident, SLOTS: taken - resident}
    parts[EXPERTS] = streamer.expert_bytes if number == 0 else 0
    return _with_spare(parts | own, plan.device_budget)


def host_parts(plan: MemoryPlan) -> dict[str, int]:
    """The same of host memory; none where the device computes in it. Mapped files are the page
    cache itself: nothing is allocated for them."""
    taken = plan.streamer.placement.host_bytes
    sizes = zip(plan.streamer.sizes, plan.streamer.tiers, strict=True)
    resident = sum(size.host_nbytes for size, tier in sizes if tier == "host")
    own = {name: nbytes for name, nbytes in plan.host.items() if name != "layers"}
    return _with_spare({RESIDENT: resident, SLOTS: taken - resident, **own}, plan.host_budget)


def _with_spare(parts: dict[str, int], budget: int | None) -> dict[str, int]:
    return parts if budget is None else {**parts, SPARE: budget - sum(parts.values())}


def table(plan: MemoryPlan) -> str:
    """A line for each part of each memory, with what it holds."""
    streamer = plan.streamer
    lines = list[str]()
    for number, device in enumerate(streamer.machine.devices):
        lines += _of_memory(
            f"device {device}",
            device_parts(plan, number),
            _limit(plan.device_budget, named=plan.named),
            _explained(plan, "device", number),
        )
    if not streamer.machine.unified:
        lines += _of_memory(
            "host",
            host_parts(plan),
            _limit(plan.host_budget, named=True),
            _explained(plan, "host", 0),
        )
    streamed = sum(tier != "device" for tier in streamer.tiers[: plan.num_layers])
    moved = sum(
        size.read_nbytes if streamer.machine.unified else size.copy_nbytes
        for size, tier in zip(streamer.sizes, streamer.tiers, strict=True)
        if tier != "device"
    )
    if streamed or moved:
        lines.append(
            f"streamed each pass: {streamed} of {plan.num_layers} layers, {format_bytes(moved)} "
            f"(files {streamer.read_mode}: {streamer.reason})"
        )
    return "\n".join([*lines, *_computed_there(plan)])


def _computed_there(plan: MemoryPlan) -> list[str]:
    """A line for layers that are computed in host memory; another for what their number was chosen
    by."""
    streamer, choice = plan.streamer, plan.host_choice
    there = len(streamer.host_layers)
    if not there and choice is None:
        return []
    lines = [
        f"computed in host memory, in passes of few tokens: {there} of {plan.num_layers} layers"
    ]
    if choice is None:
        return lines
    if choice.idle:
        return [f"{lines[0]} ({choice.idle})"]
    rates = ", ".join(f"{kind} {_rate(rate)}" for kind, rate in choice.products.items())
    lines.append(f"  the processor multiplies {rates}, beside {_rate(choice.links)} of copies")
    if (both := streamer.predicted_on_host) is not None:
        lines.append(f"  a token: links {both[0]:.4f} s, processor {both[1]:.4f} s")
    return lines


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _limit(budget: int | None, *, named: bool) -> str:
    if budget is None:
        return ""
    what = "a budget of" if named else "free memory less a margin,"
    return f" of {what} {format_bytes(budget)}"


def _of_memory(
    name: str, parts: Mapping[str, int], limit: str, explained: Mapping[str, str]
) -> list[str]:
    used = sum(nbytes for part, nbytes in parts.items() if part != SPARE)
    lines = [f"{name}: {format_bytes(used)}{limit}"]
    for part, nbytes in parts.items():
        if nbytes:
            text = f"  {format_bytes(nbytes):>11}  {part:<16} {explained.get(part, '')}"
            lines.append(text.rstrip())
    return lines if len(lines) > 1 else [f"{lines[0]} (nothing)"]


def _explained(plan: MemoryPlan, place: str, number: int) -> dict[str, str]:
    """What is said beside the parts of a device ("device") or of host memory ("host")."""
    count, total = len(plan.devices), plan.num_layers
    steps = range(len(plan.streamer.tiers))
    steps = steps[number::count] if place == "device" else steps
    tiers, layers = plan.streamer.tiers, [i for i in steps if i < total]
    here = sum(tiers[i] == place for i in layers)
    head = [tiers[i] for i in steps if i >= total]
    resident = f"{here} of {len(layers)} layers"
    if head and all(tier == place for tier in head):
        resident += ", output head"
    if place == "host" and plan.streamer.read_mode == "mapped":
        resident += ", mapped: the page cache itself"
    spilled = sum(i in plan.host_layers for i in layers)
    kept = len(layers) - spilled if place == "device" else spilled
    slots = plan.streamer.placement.device_slots[number].count
    return {
        RESIDENT: resident,
        SLOTS: f"{slots} layers in use or on their way" if place == "device" else "reads",
        EXPERTS: f"{plan.streamer.expert_slots}, for those that layers ask for",
        "keys and values": f"{plan.kv_tokens:,} tokens of {kept} layers",
        "their slots": f"keys and values of {spilled} layers pass through them",
        "residual stream": f"{plan.kv_tokens:,} tokens",
        "temporaries": f"of {min(plan.chunk, plan.kv_tokens):,} tokens, a chunk of a prompt",
        "static tensors": "norms, " + ("scales of the output head" if head else "output head"),
        "scratch": "packed weights are unpacked into it",
        "draft": _draft(plan),
        "reserved": "the caller's: reserve_bytes",
        "embedding": "rows on their way to the device",
    }


def _draft(plan: MemoryPlan) -> str:
    """What drafts, and what a pass takes longer for it: its bytes could be layers instead."""
    copied, seconds = sum(plan.streamer.placement.copy_bytes), plan.streamer.predicted_seconds
    if not copied:
        return "what drafts"
    more = min(plan.device["draft"], copied)
    words = f"what drafts; else a pass would copy up to {format_bytes(more)} less"
    return words + (f", {seconds * more / copied:.3f} s" if seconds else "")
