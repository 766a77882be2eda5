"""The tensors of a checkpoint that nothing uses: a short list of what changes nothing.

Every tensor of a model is used, or is found here, or the model is refused with the tensor's name:
one that is left out in silence is another text. Only headers are read, but for a few small tensors
that change nothing if they hold nothing but zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from layer_streamer import TensorSpec

from ..errors import UnsupportedModelError
from .packed import FLOATS
from .stored import read_values

ROTARY_CACHES = (
    r"\w*inv_freq",
    r"(cos|sin|cos_sin)_cached?",
    r"freqs_(cis|cos|sin)",
    r"(rope|rotary\w*)\.(freqs|cos|sin)",
    r"attn_rot_embd\.weight",
)
"""Of positions: they are made from the config."""
ACTIVATION_SCALES = (
    r"(input|output)_(scale|zero_point)",
    r"input_scale_ub",
    r"(\w*attn|attention)\.((attn|[qkv]_proj|qkv_proj|kv_cache)\.)?"
    r"([qkv]|kv|prob|prob_output|[kv]_cache|kv_cache)_(scale|zero_point|scaling_factor)",
)
"""What activations, keys, values and attention would be rounded with: they are not rounded."""
OPTIMIZER_STATES = (r"(max_)?exp_avg(_sq)?", r"momentum_buffer")
MASKED = r"(\w*attn|attention)\.masked_bias"
"""The number that a causal mask puts in place of what is not seen."""
MASK = r"(\w*attn|attention)\.bias"
"""A causal mask, if it has the shape of one."""

_ANYWHERE = re.compile(
    r"(.*\.)?(" + "|".join((*ROTARY_CACHES, *ACTIVATION_SCALES, *OPTIMIZER_STATES, MASKED)) + ")"
)
_OUTSIDE = re.compile(
    r"(optimizer|optim|lr_scheduler|grad_scaler)\w*\..*"
    r"|(model\.)?(mtp|nextn)\w*\..*"  # layers that guess several tokens ahead
)
_MASK = re.compile(rf"(.*\.)?{MASK}")

NEXT_TOKEN_KEYS = re.compile(r"(eh_proj|enorm|hnorm|embed_tokens|shared_head|nextn|mtp\w*)\..*")
"""What a layer has that guesses several tokens ahead, beside what all layers have."""


def refuse_unused(unused: Mapping[str, TensorSpec], place: str, model_type: str) -> None:
    """UnsupportedModelError with the first of these tensors that is not known to change nothing.

    They are named as in their layer, or in full where they are outside of layers; ``place`` begins
    the error.
    """
    for key, spec in sorted(unused.items()):
        if not changes_nothing(key, spec):
            raise UnsupportedModelError(
                f"{place}: tensor {key!r} is no part of a {model_type} model with this config "
                f"({spec.name!r} in {spec.path})"
            )


def changes_nothing(key: str, spec: TensorSpec) -> bool:
    """True for a tensor without which a model gives the same text; reads biases."""
    if _ANYWHERE.fullmatch(key) or (key == spec.name and _OUTSIDE.fullmatch(key)):
        return True
    if _MASK.fullmatch(key) and len(spec.shape) > 1:
        return spec.shape[-1] == spec.shape[-2] and set(spec.shape[:-2]) <= {1}
    # Some tools store a bias for every matrix, of zeros where the model has none.
    is_vector = key.endswith(".bias") and len(spec.shape) == 1 and spec.dtype in FLOATS.values()
    return is_vector and not read_values(spec).any()
