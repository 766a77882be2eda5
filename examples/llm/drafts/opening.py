"""What drafts for an engine: planned before anything is allocated, then opened."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch

from layer_streamer import LayerStreamer

from ..kernels.triton_support import triton_serves
from ..kv.rows import Row
from ..memory.footprint import Footprint, Needs
from ..memory.memory_plan import MemoryPlan
from ..memory.placing import devices_of
from ..memory.wishes import Wishes
from ..opening import Limits, Model, open_runner, place, plan_memory
from ..passes.chunking import Chunking
from ..passes.decode import captured_rows
from ..passes.runner import Runner
from ..weights.dequant import Unpacker
from .drafter import Drafter
from .drafting import Drafting
from .expert_cost import cost_of
from .lookup import Lookup
from .model_draft import ModelDraft
from .own_weights import OwnWeights, own_weights, round_layers
from .pace import Pace
from .self_draft import SelfDraft
from .steps import Steps
from .vocabulary import common_vocabulary

SELF = "self"
"""As a draft: the model's own weights."""
PROMPT_CHUNK = 512
"""Tokens of a prompt that a draft model takes at a time."""
FEW = 16
"""Tokens that a draft of own weights takes at a time: one, but after a pass that has failed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to draft."""

    lookup: bool = False
    model: Model | None = None
    own_weights: bool = False

    @classmethod
    def of(
        cls, draft: str | Path | Model | None, notify: Callable[[str], None], *, lookup: bool
    ) -> Wanted:
        """``draft``: a model, which is read, or SELF. Errors are those of ``Model.read``."""
        if draft is None or draft == SELF:
            return cls(lookup, own_weights=draft == SELF)
        return cls(lookup, draft if isinstance(draft, Model) else Model.read(draft, notify))

    def __bool__(self) -> bool:
        return self.lookup or self.own_weights or self.model is not None


@dataclass(frozen=True, slots=True)
class Shared:
    """What drafters and those who ask them have together."""

    pace: Pace
    rows: dict[int, Row]
    """Of the model's cache, by the keys that drafters hear."""
    salts: dict[int, bytes]
    """Of the rows' requests, likewise: nothing of one is to show in drafts of another."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A draft model, all of it on the device."""

    model: Model
    plan: MemoryPlan
    needs: Needs
    max_length: int
    vocab: int
    """Ids that both models have."""

    name = "draft"

    @property
    def nbytes(self) -> tuple[int, ...]:
        """By device, of its memory: it is on the first."""
        budget = self.plan.device_budget
        return (self.plan.device_nbytes if budget is None else budget,)

    def open(self, target: Runner, shared: Shared, closing: ExitStack) -> Drafter:
        """What drafts for the target; ``closing`` returns its memory."""
        runner = open_runner(self.model, self.plan, self.needs)
        assert isinstance(runner.streamer, LayerStreamer)
        for close in (runner.kv.close, runner.close, runner.streamer.close):
            closing.callback(close)
        steps = Steps(runner, shared.pace, self.vocab)
        if runner.captures_passes:
            steps.warm_up()
        return ModelDraft(runner, steps, self.max_length)


@dataclass(frozen=True, slots=True)
class SelfPlan:
    """The model's own layers, rounded, each where the model's is; all else is shared."""

    own: OwnWeights
    nbytes: tuple[int, ...]
    """By device, of its memory."""
    captured_rows: int

    name = SELF

    def open(self, target: Runner, shared: Shared, closing: ExitStack) -> Drafter:
        """Likewise."""
        streamer, config, dtype = target.streamer, target.config, target.dtype
        assert isinstance(streamer, LayerStreamer)
        held = round_layers(streamer, target.names, self.own, dtype)
        closing.callback(held.close)
        chunking = Chunking(FEW, captured_rows=self.captured_rows)
        names = replace(self.own.names, adapter=target.names.adapter)  # where the target has it
        runner = Runner(held, config, names, target.kv, dtype=dtype, chunking=chunking)
        closing.callback(runner.close)
        steps = Steps(runner, shared.pace, config.vocab_size)
        if runner.decoder is not None:
            steps.warm_up()
        return SelfDraft(steps, target.kv.rows, shared.rows)


DraftPlan: TypeAlias = ModelPlan | SelfPlan


def plan_draft(
    wanted: Wanted, target: Model, limits: Limits, wishes: Wishes, dtype: torch.dtype
) -> DraftPlan | None:
    """What takes memory to draft; None: nothing does. ``dtype``: what the target computes in, and
    ``wishes.options`` where. ValueError for what cannot serve."""
    if wanted.own_weights:
        if wishes.options.get("host_layers"):
            raise ValueError("draft='self': does not go with host_layers")
        return _plan_self(target, limits, wishes, dtype)
    if wanted.model is not None:
        return _plan_model(wanted.model, target, limits, wishes, dtype)
    return None


def open_drafting(
    wanted: Wanted, plan: DraftPlan | None, target: Runner, needs: Needs, closing: ExitStack
) -> Drafting:
    """What asks all that is wanted, and what constraints leave no choice in; ``closing`` returns
    its memory."""
    streamer = target.streamer
    experts = cost_of(streamer, target.config) if isinstance(streamer, LayerStreamer) else None
    shared, sources = Shared(Pace(experts), {}, {}), dict[str, Drafter]()
    if wanted.lookup:
        sources["lookup"] = Lookup(salts=shared.salts)
    if plan is not None:
        sources[plan.name] = plan.open(target, shared, closing)
    logits = needs.max_batch + needs.drafted
    kept = (shared.pace, shared.rows, shared.salts)
    return Drafting(sources, *kept, trees=target.takes_trees, logits=logits)


def _plan_self(target: Model, limits: Limits, wishes: Wishes, dtype: torch.dtype) -> SelfPlan:
    if wishes.kv == "host":
        raise ValueError(
            'draft="self": not with kv="host", since it reads keys and values on the device'
        )
    if target.config.experts is not None:
        raise ValueError(
            f'draft="self": not with a mixture of experts ({target.config.model_type}), of which '
            "a copy would be as large as all experts: name a smaller model with the same tokenizer"
        )
    device, *others = devices_of(wishes.options)
    own = own_weights(target.manifest, target.names, dtype)
    memory = device if device.type == "cpu" else torch.device("meta")
    widest = own.names.widest(dtype, own.names.cast(device, dtype))
    scratch = Unpacker(memory, dtype, widest, kernels=triton_serves(device))
    captured = min(captured_rows(device, target.config), 1)
    needs = Needs(
        kv_tokens=limits.tokens(target.config),
        max_batch=1,
        dtype=dtype,
        device_type=device.type,
        int8=False,
        packed_nbytes=scratch.nbytes,
        captured_rows=0 if others else captured,  # no graph spans devices
        captured_rows_streamed=captured if others else 0,
    )
    footprint = Footprint(target.config, needs)
    parts = (
        scratch.nbytes, footprint.residual(), footprint.temporaries(FEW), footprint.captured(),
        footprint.captured_layers(), footprint.logits(),
    )  # fmt: skip
    count = 1 + len(others)
    layers = (sum(own.nbytes[number::count]) for number in range(count))
    return SelfPlan(own, tuple(sum(parts) + nbytes for nbytes in layers), captured)


def _plan_model(
    model: Model, target: Model, limits: Limits, wishes: Wishes, dtype: torch.dtype
) -> ModelPlan:
    length = min(limits.length(target.config), model.config.max_positions)
    own = replace(limits, max_length=length, kv_tokens=limits.tokens(target.config))
    own = replace(own, drafted=0, reproducible=False)  # a draft is right or wrong, to no bit
    options, dtype = place(model, devices_of(wishes.options)[0], dtype, {})
    asked = Wishes(kv="device", prefill_chunk=PROMPT_CHUNK, options=options)
    plan, needs = plan_memory(model, own, asked, dtype)
    named = wishes.device_budget is not None or wishes.host_budget is not None
    if named or not plan.streamer.machine.unified:
        layers = sum(size.device_nbytes for size in plan.streamer.sizes)
        whole = layers + plan.reserve_nbytes + Footprint(model.config, needs).captured()
        budget = max(whole, plan.device_nbytes)
        plan, needs = plan_memory(model, own, replace(asked, device_budget=budget), dtype)
    return ModelPlan(model, plan, needs, length, common_vocabulary(target, model))
