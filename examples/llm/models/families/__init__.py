"""The types of models that the engine computes, a file each."""

from __future__ import annotations

from collections.abc import Mapping

from .family import Family
from .gemma3 import GEMMA3
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Family"]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS,
    )
}  # fmt: skip
"""By transformers' name."""
