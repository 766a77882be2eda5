"""GPTQ and AWQ weights become numbers: for transformers' loader, which has no such operation.

Their own kernels pack weights anew once all are loaded, which cannot be done to weights that come
and go. So the model keeps its plain layers, and each weight is unpacked on the device, as FP8 and
MXFP4 weights are where there is no kernel for them. Imports transformers: import it late.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from ...errors import ConfigError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's GEMM layout: which of eight columns lies in which four bits of a word."""
_KINDS = ("qweight", "qzeros", "scales", "g_idx")


class IntegerQuantizer(HfQuantizer):
    """Tells transformers' loader which tensors make up a weight, and what makes it of them."""

    serialized_names = {"weight": list(_KINDS)}  # noqa: RUF012 - as the base class has it

    def __init__(self, stored: dict[str, Any]) -> None:
        """``stored`` is the checkpoint's quantization_config. ConfigError for a layout that is
        not known here."""
        settings: Any = SimpleNamespace(quant_method=stored["quant_method"], dequantize=True)
        super().__init__(settings)
        kind = str(stored.get("checkpoint_format") or stored.get("format") or "gptq")
        self.bits = int(stored.get("bits", 4))
        self.awq = stored["quant_method"] == "awq"
        if self.awq:
            kind = str(stored.get("version") or stored.get("format") or "gemm").lower()
        # The first GPTQ layout stores zeros less one.
        self.offset = int(kind == "gptq")
        known = ("gemm",) if self.awq else ("gptq", "gptq_v2")
        widths = (4,) if self.awq else (2, 4, 8)
        if kind not in known or self.bits not in widths:
            raise ConfigError(
                f"quantization {stored['quant_method']!r}: layout {kind!r} with {self.bits} bits "
                f"cannot be streamed: expected {' or '.join(known)} with {list(widths)} bits"
            )

    def get_load_operations(self) -> dict[str, Any]:
        """What transformers puts before its own operations."""
        return {"dequantize": Unpack}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class Unpack(ConversionOps):
    """From words of packed integers, their zeros and scales to weights, on their device."""

    def __init__(self, hf_quantizer: IntegerQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Weights of one layer, under its own name; of many experts, under the first tensor's."""
        full_layer_name: str = kwargs["full_layer_name"]
        dtype = kwargs["model"].get_parameter(full_layer_name).dtype
        if "qweight" in input_dict:
            parts = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
            return {full_layer_name: self._weight(parts, dtype)}
        found = {}
        for key in [key for key in input_dict if key.endswith("qweight")]:
            stem = key.removesuffix("qweight")
            lists = {k: input_dict[stem + k] for k in _KINDS if stem + k in input_dict}
            experts = [
                dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)
            ]
            found[key] = [self._weight(parts, dtype) for parts in experts]
        return found

    def _weight(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """(out, in), from qweight, qzeros and scales whose columns are the rows of the weight."""
        quantizer, scales = self.hf_quantizer, parts["scales"].float()
        if quantizer.awq:
            numbers = self._spread(parts["qweight"], 1, AWQ_ORDER)
            zeros = self._spread(parts["qzeros"], 1, AWQ_ORDER)
        else:
            numbers, zeros = self._spread(parts["qweight"], 0), self._spread(parts["qzeros"], 1)
            zeros = (zeros + quantizer.offset) & (2**quantizer.bits - 1)
        width, groups = len(numbers), len(scales)
        group = parts.get("g_idx")
        if group is None:
            group = torch.arange(width, device=scales.device) * groups // width
        group = group.long()
        weight = (numbers.float() - zeros.float()[group]).mul_(scales[group])
        return weight.t().to(dtype).contiguous()

    def _spread(
        self, words: torch.Tensor, dim: int, order: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """The integers in int32 words, uint8, of which each word becomes several along ``dim``."""
        bits = self.hf_quantizer.bits
        count = 32 // bits
        shape = list(words.shape)
        shape.insert(dim + 1, count)
        spread = torch.empty(shape, dtype=torch.uint8, device=words.device)
        for place, index in enumerate(order or range(count)):
            # One shift at a time: all at once would take as many words as there are integers.
            spread.select(dim + 1, index).copy_((words >> (bits * place)) & (2**bits - 1))
        return spread.flatten(dim, dim + 1)
