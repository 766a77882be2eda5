"""What an engine is made of, opened together and closed together."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layer_streamer import LayerStreamer

from .drafts.drafting import MOST_DRAFTED, Drafting
from .drafts.opening import DraftPlan, Wanted, open_drafting, plan_draft
from .errors import one_line_errors
from .memory.footprint import Needs
from .memory.memory_plan import MemoryPlan
from .memory.placing import devices_of
from .memory.wishes import Wishes
from .opening import Limits, Model, open_runner, place, plan_memory
from .passes.runner import Runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """Thread rules: those of the passes."""

    plan: MemoryPlan
    streamer: LayerStreamer
    runner: Runner
    drafting: Drafting | None
    closing: ExitStack
    """Returns all memory."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Parts that are not open yet."""

    plan: MemoryPlan
    needs: Needs
    draft: DraftPlan | None


def plan_parts(
    model: Model, limits: Limits, wishes: Wishes, dtype: torch.dtype, wanted: Wanted
) -> Planned:
    """Where everything will be; nothing is allocated. ``wishes.options`` are those of ``place``.
    ValueError with the least budget that would do, or for a draft that cannot serve."""
    limits = replace(limits, drafted=MOST_DRAFTED if wanted else 0)
    if wanted.own_weights and wishes.kv == "auto":
        wishes = replace(wishes, kv="device")
    draft = plan_draft(wanted, model, limits, wishes, dtype)
    nbytes = draft.nbytes if draft is not None else ()
    plan, needs = plan_memory(model, limits, wishes, dtype, nbytes)
    if _head_stays(plan) and not limits.reproducible:
        # As one matrix: pieces as small as layers take several times as long.
        at_once = replace(wishes, options={**wishes.options, "tail": []})
        with suppress(ValueError):
            whole, own = plan_memory(model, limits, at_once, dtype, nbytes)
            if set(whole.streamer.tiers) == {"device"} and whole.captures == plan.captures:
                plan, needs = whole, own
    return Planned(plan, needs, draft)


def _head_stays(plan: MemoryPlan) -> bool:
    """True: nothing of the layers streams to a GPU, nor of the output head's pieces, as far as
    there are any. Over several GPUs it stays in pieces, of which each has its share."""
    device, *others = devices_of(plan.options)
    on_gpu = device.type != "cpu" and not others
    return on_gpu and bool(plan.options["tail"]) and set(plan.streamer.tiers) == {"device"}


def open_parts(model: Model, planned: Planned, wanted: Wanted) -> Parts:
    """Open what was planned; after an error nothing is left. StreamerError."""
    with one_line_errors("the engine cannot be opened"), ExitStack() as closing:
        runner = open_runner(model, planned.plan, planned.needs)
        streamer = runner.streamer
        assert isinstance(streamer, LayerStreamer)
        for close in (runner.kv.close, runner.close, streamer.close):
            closing.callback(close)
        drafting = open_drafting(wanted, planned.draft, runner, planned.needs, closing)
        return Parts(planned.plan, streamer, runner, drafting, closing.pop_all())


def preview(model: Model, draft: str | Path | Model, **options: Any) -> MemoryPlan:
    """The plan of an engine with that draft, which is not opened; options as of the engine. Errors
    are those of the engine's, too."""
    budgets = {name: options.pop(name, None) for name in ("device_budget", "host_budget")}
    reserve = options.pop("reserve_bytes", 0)
    wanted = Wanted.of(draft, logger.info, lookup=False)
    limits = Limits(options.pop("max_length", None))
    own = wanted.own_weights
    device, dtype = (options.pop(name, None) for name in ("device", "dtype"))
    placed, dtype = place(model, device, dtype, options, loads_head=own)
    wishes = Wishes(reserve_bytes=reserve, options=placed, **budgets)
    return plan_parts(model, limits, wishes, dtype, wanted).plan
