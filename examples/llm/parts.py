"""What an engine is made of, opened together and closed together."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from layer_streamer import LayerStreamer

from .drafts.drafting import MOST_DRAFTED, Drafting
from .drafts.opening import Wanted, open_drafting, plan_draft
from .errors import one_line_errors
from .memory.plan import MemoryPlan, Wishes
from .opening import Limits, Model, open_runner, plan_memory
from .passes.runner import Runner


@dataclass(frozen=True, slots=True)
class Parts:
    """Thread rules: those of the passes."""

    plan: MemoryPlan
    streamer: LayerStreamer
    runner: Runner
    drafting: Drafting | None
    closing: ExitStack
    """Returns all memory."""


def open_parts(
    model: Model, limits: Limits, wishes: Wishes, dtype: torch.dtype, wanted: Wanted
) -> Parts:
    """Plan, and open; after an error nothing is left. ValueError with the least budget that would
    do, or for a draft that cannot serve; StreamerError."""
    limits = replace(limits, drafted=MOST_DRAFTED if wanted else 0)
    if wanted.own_weights and wishes.kv == "auto":
        wishes = replace(wishes, kv="device")
    draft = plan_draft(wanted, model, limits, wishes, dtype)
    nbytes = draft.nbytes if draft is not None else 0
    plan, needs = plan_memory(model, limits, wishes, dtype, nbytes)
    with one_line_errors("the engine cannot be opened"), ExitStack() as closing:
        runner = open_runner(model, plan, needs)
        streamer = runner.streamer
        assert isinstance(streamer, LayerStreamer)
        for close in (runner.kv.close, runner.close, streamer.close):
            closing.callback(close)
        drafting = open_drafting(wanted, draft, runner, closing)
        return Parts(plan, streamer, runner, drafting, closing.pop_all())
