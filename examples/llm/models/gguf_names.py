"""Names of a model's modules in GGUF files."""

from __future__ import annotations

from .modules import ROUTER, SHARED, SHARED_GATE, expert_of

GGUF_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's modules: the name in transformers, the name in GGUF."""

GGUF_OUTPUT_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""The same of models that norm what attention and feed-forward give."""

GGUF_MIXTURE = {
    ROUTER: "ffn_gate_inp",
    SHARED_GATE: "ffn_gate_inp_shexp",
    f"{SHARED}.gate_proj": "ffn_gate_shexp",
    f"{SHARED}.up_proj": "ffn_up_shexp",
    f"{SHARED}.down_proj": "ffn_down_shexp",
}
"""The same of mixtures of experts, but for the experts."""

GGUF_EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
"""The matrices of experts: those of all of a layer are one tensor."""

GGUF_STATIC = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""The same of what is outside of layers."""

GGUF_PARTS = ("v.", "a.", "mm.")
"""Beginnings of what a file may have beside a language model: encoders of images and sound."""


def gguf_module(module: str, *, output_norms: bool = False, apart: bool = False) -> str:
    """A layer's module in GGUF, by its name in the engine; ``output_norms``: see ``Family``;
    ``apart``: each expert has tensors of its own, as in the first files of Mixtral."""
    found = expert_of(module)
    if found is not None:
        expert, matrix = found
        return f"{GGUF_MODULES[f'mlp.{matrix}']}.{expert}" if apart else GGUF_EXPERTS[matrix]
    if output_norms and module in GGUF_OUTPUT_NORMS:
        return GGUF_OUTPUT_NORMS[module]
    return GGUF_MODULES.get(module) or GGUF_MIXTURE[module]
