"""A layer whose experts come on demand, in a pass of captured rows: two captures, between which it
becomes known who is asked for.

Which experts a token passes is computed by the first, and brought to the host; then experts are
brought to slots, whose numbers the second one reads. Copies of those that are missing travel beside
the expert that all tokens pass, which has a capture of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..models.config import ModelConfig
from ..models.feed_forward import choose, shared
from ..models.mixing import goes_by_token, mix, mix_by_token
from ..models.model import Attention, attention_added, attention_inputs, fed
from ..weights.weights import StepWeights

Launch = Callable[[str, Callable[[], None]], None]
"""Do a part of a layer, by its name, captured if that can be."""


class CapturedMixture:
    """Memory in which the parts of a layer leave what the next one takes, for so many rows.

    Thread rules: one thread.
    """

    def __init__(
        self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        experts = config.experts
        assert experts is not None
        self._config, self._each = config, experts.per_token
        cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self._normed_RD = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
            self._shared_RD = torch.zeros_like(self._normed_RD)
            ids = torch.zeros(rows, self._each, dtype=torch.int64, device="cpu")
            self._ids_RK = torch.zeros_like(ids, device=device)
            self._shares_RK = torch.zeros_like(self._ids_RK, dtype=torch.float32)
            self._slots_P = torch.zeros_like(self._ids_RK).view(-1)
            self._told_RK = ids.pin_memory() if cuda else ids
            """Who is asked for, on the host."""
            self._asked_P = ids.clone().pin_memory() if cuda else ids.clone()
            """Their slots, on the host."""
            self._asked_P = self._asked_P.view(-1)
        self._event = torch.cuda.Event() if cuda else None
        self._by_token: dict[int, bool] = {}

    def compute(
        self,
        x_RD: torch.Tensor,
        weights: StepWeights,
        attention: Attention,
        launch: Launch,
    ) -> None:
        """``decoder_layer`` of a layer that is a mixture, in place; ``attention`` rotates."""
        config, rows = self._config, len(x_RD)
        experts = config.mixture(weights.layer_idx)
        assert experts is not None
        normed_RD, ids_RK = self._normed_RD[:rows], self._ids_RK[:rows]
        shares_RK, slots_P = self._shares_RK[:rows], self._slots_P[: rows * self._each]

        def choosing() -> None:
            qkv = attention_inputs(x_RD, weights, config, None)
            mixed_HTE = attention(weights.layer_idx, *qkv)
            added_RD, normed = attention_added(x_RD, mixed_HTE, weights, config)
            ids, shares = choose(normed, weights, experts)
            for kept, new in zip(
                (x_RD, normed_RD, ids_RK, shares_RK), (added_RD, normed, ids, shares), strict=True
            ):
                kept.copy_(new)

        def sharing() -> None:
            self._shared_RD[:rows] = shared(normed_RD, weights, config)

        def mixing(mixed: Callable[[], torch.Tensor]) -> None:
            mixed_RD = mixed()
            if experts.shared_width:
                mixed_RD = mixed_RD.add_(self._shared_RD[:rows])
            fed(x_RD, mixed_RD, weights, config, out=x_RD)

        launch("choosing", choosing)
        self._tell(ids_RK)
        if experts.shared_width:
            launch("sharing", sharing)
        if self._bring(weights, normed_RD, rows):
            by_token = partial(mix_by_token, normed_RD, slots_P, shares_RK, weights, config)
            launch("mixing", partial(mixing, by_token))
        else:
            mixing(partial(mix, normed_RD, ids_RK, shares_RK, weights, config))

    def _tell(self, ids_RK: torch.Tensor) -> None:
        """Bring who is asked for to the host."""
        self._told_RK[: len(ids_RK)].copy_(ids_RK, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def _bring(self, weights: StepWeights, normed_RD: torch.Tensor, rows: int) -> bool:
        """Have those who are asked for in slots, and these where the last capture looks for them;
        False: that cannot be done, or not all at once."""
        served = self._by_token.get(weights.layer_idx)
        if served is None:
            served = self._by_token[weights.layer_idx] = goes_by_token(normed_RD, weights)
        if not served:
            return False
        if self._event is not None:
            self._event.synchronize()
        asked = self._told_RK[:rows].flatten().tolist()
        where = weights.bring(asked)
        if where is None:
            return False
        count = len(asked)
        self._asked_P[:count] = torch.tensor([where[expert] for expert in asked], device="cpu")
        self._slots_P[:count].copy_(self._asked_P[:count], non_blocking=True)
        return True
