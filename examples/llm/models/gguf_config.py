"""The config that a GGUF file's metadata and tensors amount to, in the schema of transformers.

transformers derives configs from GGUF files, too, but leaves out what those files say of scaled
rotations, windows, biases and the ids that end a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layer_streamer import Manifest

from ..errors import UnsupportedModelError
from .families import FAMILIES, Family
from .families.mixture import Mixture
from .gguf_keys import GgufKeys
from .rope_config import check_rope_types, yarn_magnitude

ARCHITECTURES = tuple(dict.fromkeys(family.gguf for family in FAMILIES.values()))
"""GGUF's names of the types of models."""
SOFTMAX, SOFTMAX_OF_CHOSEN = 1, 3
"""GGUF's numbers of what routers' logits pass before experts are chosen by them, and after."""


def gguf_config(manifest: Manifest) -> dict[str, Any]:
    """What config.json would say; UnsupportedModelError for a model the engine cannot compute."""
    keys = GgufKeys(manifest)
    if keys.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{manifest.path}: architecture {keys.architecture!r} is not supported "
            f"(only {', '.join(ARCHITECTURES)})"
        )
    family = _family(keys)
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // max(1, heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.refusal(key, f"only the width of a head, {head_dim}, is supported")
    if not keys.get("attention.causal", True):
        raise keys.refusal("attention.causal", "an encoder generates no text")
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "num_hidden_layers": keys.integer("block_count") - keys.integer("nextn_predict_layers", 0),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _vocab_size(manifest),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in manifest.static,
        "bos_token_id": manifest.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(manifest.metadata),
        "rope_parameters": _rope(keys),
    }
    check_rope_types(config)
    layer = manifest.layers[0].tensors if manifest.layers else {}
    config["attention_bias"] = any(name.startswith("attn_") and "bias" in name for name in layer)
    config["mlp_bias"] = any(name.startswith("ffn_") and "bias" in name for name in layer)
    if family.mixture is not None:
        config |= _experts(keys, family.mixture, config["intermediate_size"])
    window = keys.integer("attention.sliding_window", 0)
    return config | family.from_gguf(keys, config, window)


def window_note(manifest: Manifest) -> str | None:
    """What to tell people about a file whose model may have a window that the file leaves out."""
    keys = GgufKeys(manifest)
    if keys.architecture not in ARCHITECTURES or not _family(keys).gguf_has_window:
        return None
    if keys.get("attention.sliding_window"):
        return None
    return f"{manifest.path.name} names no sliding window: every layer sees the whole context"


def _family(keys: GgufKeys) -> Family:
    """The type of models of a known architecture: mixtures may share its name with others."""
    mixed = keys.integer("expert_count", 0) > 0
    for family in FAMILIES.values():
        if family.gguf == keys.architecture and (family.mixture is not None) == mixed:
            return family
    without = "a mixture of experts" if mixed else "a model without experts"
    raise keys.refusal("expert_count", f"{without} is not supported of this architecture")


def _experts(keys: GgufKeys, mixture: Mixture, ffn: int) -> dict[str, Any]:
    """What the file says of them, ``ffn`` being the width of a block in layers that have none."""
    function = keys.get("expert_gating_func", 0)
    expected = SOFTMAX_OF_CHOSEN if mixture.of_chosen else SOFTMAX
    if function not in (0, expected):  # 0: not said
        raise keys.refusal("expert_gating_func", f"only a softmax, {expected}, is supported")
    for key in ("expert_weights_scale", "expert_group_count"):
        if keys.get(key) not in (None, 0, 1):
            raise keys.refusal(key, "is not supported")
    used = keys.integer("expert_used_count")
    found = {mixture.experts: keys.integer("expert_count"), "num_experts_per_tok": used}
    own = ffn if mixture.width == "intermediate_size" else ffn // max(1, used)
    found[mixture.width] = keys.integer("expert_feed_forward_length", own)
    if mixture.shared_width is not None:
        found[mixture.shared_width] = keys.integer("expert_shared_feed_forward_length", ffn)
    normed = bool(keys.get("expert_weights_norm", mixture.normed_in_gguf))
    if mixture.normed is not None:
        found[mixture.normed] = normed
    elif not normed:
        raise keys.refusal("expert_weights_norm", "this architecture's are always normed")
    return found


def _vocab_size(manifest: Manifest) -> int:
    if "token_embd.weight" not in manifest.static:
        raise UnsupportedModelError(f"{manifest.path}: tensor 'token_embd.weight' is missing")
    return manifest.static["token_embd.weight"].shape[0]


def _eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ends of a text, of a turn and of a message."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return sorted({int(metadata[name]) for name in names if name in metadata})


def _rope(keys: GgufKeys) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base", 1e4),
    }
    kind = str(keys.get("rope.scaling.type") or "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = keys.integer("rope.scaling.original_context_length", 0)
        magnitude = yarn_magnitude(factor)
        for name in ("attn_factor", "yarn_attn_factor"):
            magnitude *= keys.number(f"rope.scaling.{name}", 1.0)
        rope |= {
            "original_max_position_embeddings": original or keys.integer("context_length"),
            "attention_factor": magnitude,
            "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    return rope
