"""Quantized checkpoints of transformers: the modules that hold them, before their names are found.

What a checkpoint stores as plain tensors streams as it lies. Where transformers runs such tensors
as they are (FP8 on GPUs that can), the module's parameters are those; everywhere else they become
numbers again on the device, each time that their block is due: a conversion like any other.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError

_KEPT = ("fp8", "compressed-tensors", "mxfp4")
"""Methods whose stored tensors are all that is needed."""
_INTEGERS = ("gptq", "awq")
"""Methods whose weights are unpacked here, for no operation of transformers does that."""
_REASONS = {"bitsandbytes": "its weights are packed by its own kernels while they are loaded"}
_TOO_OLD = "this transformers unpacks whole models only, a newer one can"
_WAY_OUT = (
    "; name a checkpoint in FP8, MXFP4, compressed-tensors, GPTQ or AWQ, or one without "
    "quantization, which `layer-streamer quantize` packs"
)


def prepare_quantized(model: Any, device: torch.device) -> None:
    """Give a transformers model on the meta device the modules that its checkpoint's quantization
    asks for, for :func:`.names.name_tensors` to name; does nothing if it asks for none.

    Sets ``model.hf_quantizer``, as ``from_pretrained`` does. ``device`` is where it will run.
    Errors: ConfigError for a method whose weights cannot be streamed, and for one that transformers
    cannot run here, with transformers' own reason.
    """
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        return
    method = _method(stored)
    if method in _INTEGERS:
        model.hf_quantizer = _integer_quantizer(method, stored)
        return
    if method not in _KEPT:
        reason = _REASONS.get(method, "what it makes of stored tensors are no plain tensors")
        raise ConfigError(f"quantization {method!r} cannot be streamed: {reason}{_WAY_OUT}")
    from transformers.quantizers import auto

    make: Any = auto.get_hf_quantizer
    try:
        quantizer, _, _ = make(model.config, None, {"": device}, True, {})
        if method != "fp8":
            # The other way weights are packed anew as they are loaded, or unpacked for good at
            # the first forward: neither leaves parameters that can be lent.
            quantizer.quantization_config.dequantize = True
            if not quantizer.get_weight_conversions():
                raise RuntimeError(_TOO_OLD)
        with torch.device("meta"):
            quantizer.preprocess_model(
                model=model, dtype=model.dtype, device_map={"": device}, checkpoint_files=[],
                use_kernels=False,
            )  # fmt: skip
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"quantization {method!r} cannot be run here: {error}") from error
    model.hf_quantizer = quantizer


def _integer_quantizer(method: str, stored: Any) -> Any:
    from transformers.quantizers.base import HfQuantizer

    if not hasattr(HfQuantizer, "get_load_operations"):
        raise ConfigError(f"quantization {method!r} cannot be streamed: {_TOO_OLD}")
    from .packed_integers import IntegerQuantizer

    settings = stored if isinstance(stored, dict) else stored.to_dict()
    return IntegerQuantizer({**settings, "quant_method": method})


def _method(stored: Any) -> str:
    """The name of the method, of a configuration as it lies or as an object."""
    if not isinstance(stored, dict):
        stored = stored.to_dict()
    method = stored.get("quant_method", "")
    if not method and any(key.startswith("load_in_") for key in stored):
        method = "bitsandbytes"
    return str(getattr(method, "value", method))
