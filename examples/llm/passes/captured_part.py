"""A part of a prompt beside captured rows: what layers compute of it is captured, too, but for
attention.

Python takes longer to launch a layer for some hundred tokens than a link takes to bring it, and
rows that decode would wait for that. How far a part looks back is different for each, so its
attention is launched; what comes before and after it is two captures a layer and place of weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..models.config import ModelConfig
from ..models.model import Attention, attended, attention_inputs
from ..weights.weights import StepWeights

Launch = Callable[[str, Callable[[], None]], None]
"""Do a half of a layer, by its name, captured if that can be."""


class CapturedPart:
    """So many tokens, in memory of their own, where every layer finds and leaves them.

    Fewer are computed as if there were as many: what is behind them is of parts before, and nobody
    looks at it. Thread rules: one thread.
    """

    def __init__(
        self, config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens, self._config = tokens, config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(tokens, *shape, dtype=dtype, device=device)

        with torch.inference_mode(False):
            self._x_TD = zeros(config.hidden_size)
            self._q_THE, self._mixed_THE = zeros(heads, width), zeros(heads, width)
            self._kv_THE = zeros(kv_heads, width), zeros(kv_heads, width)
            angles = zeros(2, width // 2, dtype=torch.float32)
            self._table_2TE = angles.transpose(0, 1).contiguous()

    def takes(self, count: int) -> bool:
        """True: so many tokens are worth to be computed as if they were all."""
        return count <= self.tokens < 2 * count

    def compute(
        self,
        x_TD: torch.Tensor,
        weights: StepWeights,
        table_2TE: torch.Tensor,
        attention: Attention,
        launch: Launch,
    ) -> None:
        """``decoder_layer`` of one layer, in place."""
        count, config = len(x_TD), self._config
        self._x_TD[:count] = x_TD
        self._table_2TE[:, :count] = table_2TE
        outputs = (self._q_THE, *self._kv_THE)

        def before() -> None:
            found = attention_inputs(self._x_TD, weights, config, self._table_2TE)
            for kept, new in zip(outputs, found, strict=True):
                kept.copy_(new.transpose(0, 1))

        def after() -> None:
            mixed_HTE = self._mixed_THE.transpose(0, 1)
            attended(self._x_TD, mixed_HTE, weights, config, out=self._x_TD)

        launch("before", before)
        qkv = (kept[:count].transpose(0, 1) for kept in outputs)
        self._mixed_THE[:count] = attention(weights.layer_idx, *qkv).transpose(0, 1)
        launch("after", after)
        x_TD.copy_(self._x_TD[:count])
