"""The numbers of a mixture of experts, taken from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError
from .families.family import check
from .families.mixture import Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Clamp:
    """The numbers of clamped gates: (up + 1) * gate * sigmoid(alpha * gate)."""

    alpha: float
    limit: float
    """Of the gate, above; of ``up``, from zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """What the mixtures among a model's layers have."""

    count: int
    per_token: int
    """How many a token passes."""
    width: int
    """Between the two matrices of one."""
    shared_width: int
    """The same of the block that every token passes; 0: there is none."""
    normed: bool
    """What a token's experts count is divided by its sum."""
    rounded: bool
    """It is then rounded to the layer's dtype."""
    of_chosen: bool = False
    """What they count is a softmax over the chosen ones, not over all."""
    clamp: Clamp | None = None
    """How gates work that are clamped, of matrices with biases; None: as the family says."""
    layers: frozenset[int]
    """Those that are mixtures; others have one feed-forward block."""

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.count * len(self.layers)


def experts_of(hf_config: Any, mixture: Mixture) -> Experts | None:
    """Those of a config; None: it has none. UnsupportedModelError for numbers of no sense."""
    layers = frozenset(_layers(hf_config, mixture))
    count, per_token = int(getattr(hf_config, mixture.experts)), int(hf_config.num_experts_per_tok)
    if not layers or not count:
        return None
    if not 1 <= per_token <= count:
        raise UnsupportedModelError(
            f"num_experts_per_tok {per_token}: must be from 1 to the number of experts, {count}"
        )
    shared = 0 if mixture.shared_width is None else int(getattr(hf_config, mixture.shared_width))
    return Experts(
        count=count,
        per_token=per_token,
        width=int(getattr(hf_config, mixture.width)),
        shared_width=shared,
        normed=mixture.normed is None or bool(getattr(hf_config, mixture.normed)),
        rounded=mixture.rounded,
        of_chosen=mixture.of_chosen,
        clamp=_clamp(hf_config) if mixture.clamped else None,
        layers=layers,
    )


def _clamp(hf_config: Any) -> Clamp:
    # transformers before 5.23 has these numbers in its code.
    alpha, limit = (
        getattr(hf_config, "swiglu_alpha", 1.702),
        getattr(hf_config, "swiglu_limit", 7.0),
    )
    check("swiglu_alpha", alpha, float)
    check("swiglu_limit", limit, float)
    return Clamp(alpha=float(alpha), limit=float(limit))


def _layers(hf_config: Any, mixture: Mixture) -> list[int]:
    every = range(int(hf_config.num_hidden_layers))
    if not mixture.dense_layers:
        return list(every)
    step, dense = hf_config.decoder_sparse_step, getattr(hf_config, "mlp_only_layers", None)
    check("mlp_only_layers", dense := [] if dense is None else dense, list)
    for layer_idx in dense:
        check("mlp_only_layers", layer_idx, int)
    if step < 1:
        raise UnsupportedModelError(f"decoder_sparse_step {step}: must be at least 1")
    return [i for i in every if i not in dense and (i + 1) % step == 0]
