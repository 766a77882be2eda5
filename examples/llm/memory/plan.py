"""Shares a budget out between the streamer and the engine before either allocates anything.

What must be there comes first: the streamer's slots, the residual stream, the temporaries of one
chunk, the slots for keys and values. Then keys and values get places on the device, layer by layer,
while the budget lasts; what is left is the streamer's, for layers that stay there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layer_streamer import Manifest, Plan, format_bytes, parse_bytes, plan_checkpoint

from .footprint import Footprint
from .memory_plan import MemoryPlan
from .wishes import Wishes, device_budget_of, host_budget_of, names_budget, usable

CHUNKS = (2048, 1024, 512, 256)
"""Tokens a chunk that are tried, if none were asked for; fewer take less memory."""
NUM_DEVICE_SLOTS = (2, 1)
"""n_gpu, likewise."""
NUM_SLOTS_OF_MANY = 4
"""n_gpu that is tried before these with more than two devices, as the streamer's own default: their
links are uneven from moment to moment."""
LAUNCHED_NBYTES = 128 << 20
"""What a fast link (PCIe 5) brings while Python launches a layer's kernels: if more has to be moved
for each layer, launches are hidden."""


class Planner:
    """Makes the plan for one checkpoint on this machine."""

    def __init__(self, model: Path | Manifest, footprint: Footprint, wishes: Wishes) -> None:
        self._model, self._footprint, self._wishes = model, footprint, wishes
        self._previews: dict[tuple[tuple[str, Any], ...], Plan] = {}
        self._machine = self._preview().machine

    def make(self) -> MemoryPlan:
        """The first way that fits; ValueError, with the least budget that would do, for none."""
        budget = device_budget_of(self._wishes, self._preview())
        ways, count = list(self._ways()), self._footprint.config.num_layers
        limits = [budget]
        if self._machine.unified and not names_budget(self._wishes, self._preview()):
            limits.append(None)  # there a system that runs short swaps: nobody has forbidden that
        for limit in limits:
            for chunk, n_gpu in ways:
                plan = self._fit(chunk, n_gpu, limit)
                if plan is not None:
                    plan = self._with_host(self._with_captured(plan))
                    return replace(plan, streamer=self._preview(**plan.options))
        spilled = self._spilled(count if self._machine.unified else 0)
        least = min(
            (self._lay_out(chunk, n_gpu, spilled) for chunk, n_gpu in ways),
            key=lambda plan: plan.device_nbytes,
        )
        named = "device_budget" if self._wishes.device_budget is not None else "free memory"
        most = max(least.devices, key=lambda parts: sum(parts.values()))
        where = "the device"
        if least.others:
            where = self._machine.devices[least.devices.index(most)]
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in most.items() if n)
        raise ValueError(
            f"{named} {format_bytes(budget or 0)}: at least {least.device_nbytes} bytes "
            f"({format_bytes(least.device_nbytes)}) are needed on {where} ({parts}); "
            "grant more, or lower max_length, kv_tokens or prefill_chunk"
        )

    def _ways(self) -> Iterator[tuple[int, int | None]]:
        """(chunk, n_gpu), the best first."""
        chunks = CHUNKS if self._wishes.prefill_chunk is None else (self._wishes.prefill_chunk,)
        fixed = self._machine.unified or "n_gpu" in self._wishes.options
        many = (NUM_SLOTS_OF_MANY,) if len(self._machine.devices) > 2 else ()
        for n_gpu in (None,) if fixed else (*many, *NUM_DEVICE_SLOTS):
            for chunk in chunks:
                yield chunk, n_gpu

    def _fit(self, chunk: int, n_gpu: int | None, budget: int | None) -> MemoryPlan | None:
        """With as many layers' keys and values on the device as fit; None if nothing does."""
        count = self._footprint.config.num_layers
        tries: Sequence[int] = range(count, -1, -1)
        if self._wishes.kv == "device" or (self._wishes.kv == "auto" and self._machine.unified):
            tries = [count]  # a CPU gains nothing by a second place in the same memory
        elif self._wishes.kv == "host":
            tries = [0]
        for on_device in tries:
            plan = self._lay_out(chunk, n_gpu, self._spilled(on_device))
            if budget is None or plan.device_nbytes <= budget:
                return replace(plan, device_budget=budget)
        return None

    def _spilled(self, on_device: int) -> tuple[int, ...]:
        """Which layers are spilled if so many are not: evenly spread; those with windows, whose
        keys and values are few, last."""
        config = self._footprint.config
        if self._wishes.kv == "device":
            return ()
        if self._wishes.kv == "host":
            return tuple(range(config.num_layers))
        layers = range(config.num_layers)
        spilled = config.num_layers - on_device
        long = [i for i in layers if config.window(i) is None]
        short = [i for i in layers if config.window(i) is not None]
        chosen = _spread(long, spilled) + _spread(short, spilled - len(long))
        return tuple(sorted(chosen))

    def _lay_out(self, chunk: int, n_gpu: int | None, spilled: tuple[int, ...]) -> MemoryPlan:
        footprint, options = self._footprint, dict(self._wishes.options)
        if n_gpu is not None:
            options["n_gpu"] = n_gpu
        preview = self._preview(**options)
        placement = preview.placement
        spilled = tuple(sorted({*spilled, *preview.host_layers}))  # these are where they are used
        first, *others = (
            self._on_device(number, chunk, spilled, preview)
            for number in range(len(self._machine.devices))
        )
        return MemoryPlan(
            kv_tokens=footprint.needs.kv_tokens,
            chunk=chunk,
            host_layers=spilled,
            num_layers=footprint.config.num_layers,
            device=first,
            others=tuple(others),
            host={
                "layers": placement.host_bytes,
                "keys and values": sum(footprint.layer_on_host(i) for i in spilled),
                "embedding": footprint.gathered(chunk),
            },
            device_budget=None,
            host_budget=None,
            named=names_budget(self._wishes, preview),
            options=options,
            streamer=preview,
        )

    def _on_device(
        self, number: int, chunk: int, spilled: tuple[int, ...], preview: Plan
    ) -> dict[str, int]:
        """The parts of one device, whose layers are every so manieth one. An output head that is
        loaded, a draft model, and experts that come on demand are on the first."""
        footprint, placement = self._footprint, preview.placement
        needs, count = footprint.needs, len(preview.machine.devices)
        own = range(number, footprint.config.num_layers, count)
        away = [i for i in own if i in spilled]
        is_first = number == 0
        return {
            "layers": placement.device_bytes[number] + preview.expert_bytes * is_first,
            "keys and values": sum(footprint.layer_on_device(i) for i in own if i not in spilled),
            "their slots": footprint.staging(away, placement.device_slots[number].count),
            "residual stream": footprint.residual(),
            "static tensors": needs.static_nbytes + needs.head_nbytes * is_first,
            "scratch": needs.packed_nbytes,
            "temporaries": footprint.temporaries(chunk),
            "logits": footprint.logits(),
            "draft": sum(needs.draft_nbytes[number : number + 1]),
            "reserved": parse_bytes("reserve_bytes", self._wishes.reserve_bytes),
        }

    def _with_host(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with the streamer's budgets, if host memory has room for its part."""
        options, kv_nbytes = dict(plan.options), plan.host["keys and values"]
        own = kv_nbytes + plan.host["embedding"]
        budget = host_budget_of(self._wishes, self._preview())
        named = self._wishes.device_budget is not None
        if plan.device_budget is not None and (named or self._machine.unified):
            self._grant(options, plan)
        if self._machine.unified:
            if "device_budget" in options and not plan.named and "experts" not in options:
                # No more than all layers take, so that free memory's last byte changes no plan.
                whole = sum(size.device_nbytes for size in self._preview().sizes)
                options["device_budget"] = min(options["device_budget"], whole)
            return replace(plan, options=options)
        if budget is not None or (kv_nbytes and not self._mapping_fits(plan)):
            free = usable(self._machine.host_available) if budget is None else budget
            direct = self._preview(**(dict(plan.options) | {"read_mode": "direct"}))
            slots = direct.placement.host_bytes
            if free < own + slots:
                name = "free host memory" if budget is None else "host_budget"
                raise ValueError(
                    f"{name} {format_bytes(free)}: at least {own + slots} bytes "
                    f"({format_bytes(own + slots)}) are needed (layers {format_bytes(slots)}, "
                    f"keys and values {format_bytes(kv_nbytes)}, embedding "
                    f"{format_bytes(own - kv_nbytes)}); grant more, or lower max_length "
                    "or kv_tokens"
                )
            options["host_budget"] = free - own
        return replace(plan, options=options, host_budget=budget)

    def _with_captured(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with room for captured passes, if everything else is then on the device, too,
        or for captured layers, if less streams than hides their launches. Of several devices these
        are captured in any case but that: no graph spans devices."""
        if self._wishes.device_budget is None:
            return plan
        if not plan.host_layers and not plan.others:
            larger = self._larger(plan, "captured passes", self._footprint.captured())
            if larger is not None and self._stays(self._preview(**larger.options)):
                return replace(larger, options=plan.options)
        larger = self._larger(plan, "captured layers", self._footprint.captured_layers())
        if larger is None:
            return plan
        preview = self._preview(**larger.options)
        sizes = zip(preview.sizes, preview.tiers, strict=True)
        moved = sum(size.copy_nbytes for size, tier in sizes if tier != "device")
        streams = plan.host_layers or plan.others or not self._stays(preview)
        # Beside layers that the host computes, the device waits for each launch.
        link = moved / len(plan.devices)
        hidden = link > plan.num_layers * LAUNCHED_NBYTES and not preview.host_layers
        worth = streams and not hidden
        return replace(larger, options=plan.options) if worth else plan

    def _stays(self, preview: Plan) -> bool:
        """Nothing is moved in a pass: layers are on the device, and all experts."""
        experts, slots = self._footprint.config.experts, preview.expert_slots
        short = experts is not None and 0 < slots < experts.total
        return not short and set(preview.tiers) == {"device"}

    def _larger(self, plan: MemoryPlan, part: str, nbytes: int) -> MemoryPlan | None:
        """The plan with one part more on each device, and the streamer's budget without it; None:
        it takes none, or there is no room for it."""
        more = [{**parts, part: nbytes} for parts in plan.devices]
        larger = replace(plan, device=more[0], others=tuple(more[1:]))
        assert plan.device_budget is not None
        if not nbytes or larger.device_nbytes > plan.device_budget:
            return None
        options = dict(plan.options)
        self._grant(options, larger)
        return replace(larger, options=options)

    def _grant(self, options: dict[str, Any], plan: MemoryPlan) -> None:
        """Give the streamer its part of the device's budget."""
        assert plan.device_budget is not None
        if self._machine.unified:  # there the streamer takes no reserve off
            options["device_budget"] = plan.device_budget - plan.reserve_nbytes
        else:
            options["device_budget"] = plan.device_budget
            options["reserve_bytes"] = list(plan.reserves) if plan.others else plan.reserve_nbytes

    def _mapping_fits(self, plan: MemoryPlan) -> bool:
        return sum(plan.host.values()) <= usable(self._machine.host_available)

    def _preview(self, **options: Any) -> Plan:
        """What the streamer takes with these options and no budgets."""
        options = dict(self._wishes.options) | options
        if options.get("experts") == "demand" and options.get("device_budget") is None:
            options.setdefault("expert_slots", 1)  # the least; a budget has room for more
        key = tuple(sorted((name, repr(value)) for name, value in options.items()))
        if key not in self._previews:
            self._previews[key] = plan_checkpoint(self._model, **options)
        return self._previews[key]


def _spread(layers: Sequence[int], count: int) -> list[int]:
    """So many of the layers, at even distances."""
    count = max(0, min(count, len(layers)))
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]
