"""One table of tiny configurations: a type of transformers' models -> what it is made with.

Every type has at least two blocks (most have three), so small that a model is made in
milliseconds, with every kind of layer that the type mixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCAB = 128
IMAGE_TOKEN = 5

DECODER: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=128, head_dim=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, num_local_experts=4,
    n_routed_experts=4, n_shared_experts=1, shared_expert_intermediate_size=24,
    first_k_dense_replace=1, n_group=1, topk_group=1, decoder_sparse_step=1,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    num_key_value_heads=4, head_dim=8,
)  # fmt: skip
MIXED = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16,
)  # fmt: skip
ENCODER: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    vocab_size=VOCAB, pad_token_id=0,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    image_size=32, patch_size=8,
)  # fmt: skip
BART: dict[str, Any] = dict(
    d_model=64, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=96, decoder_ffn_dim=96,
    encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=VOCAB,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, forced_eos_token_id=None,
)  # fmt: skip
T5: dict[str, Any] = dict(
    d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=3, num_heads=4,
    vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
WAVE: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=VOCAB,
)  # fmt: skip

DENSE = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo",
    "olmo2", "olmo3", "cohere", "cohere2", "glm4", "starcoder2", "smollm3", "granite", "helium",
    "seed_oss", "arcee", "stablelm", "nemotron", "exaone4", "hunyuan_v1_dense", "ernie4_5",
    "bitnet", "apertus", "persimmon", "biogpt", "diffllama", "vaultgemma", "gpt_neox", "ministral",
]  # fmt: skip
MIXTURES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "granitemoeshared",
    "phimoe", "minimax_m2", "flex_olmo", "hunyuan_v1_moe", "ernie4_5_moe", "afmoe", "jetmoe",
    "glm4_moe", "dots1", "minimax", "llama4_text",
]  # fmt: skip
ENCODERS = [
    "bert", "xlm-roberta", "roberta", "electra", "nomic_bert", "camembert", "roberta-prelayernorm",
    "mpnet", "layoutlm", "ernie", "data2vec-text",
]  # fmt: skip
PAIRS = [
    "bart", "mbart", "m2m_100", "pegasus", "blenderbot", "marian",
]  # fmt: skip
TOWERS = [
    "vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model",
    "clip_vision_model", "deit", "ijepa", "vit_msn",
]  # fmt: skip
"""Types that one configuration does for, by what they are."""


@dataclass(frozen=True, slots=True)
class TinyType:
    """How a tiny model of a type is made and run."""

    kind: str
    """What it takes: "text", "text pair" (encoder and decoder), "speech" (encoder and decoder),
    "image", "image and text", "wave", "words" (an encoder), "multimodal" (generates from text)."""
    config: dict[str, Any]
    model_type: str = ""
    """transformers' name of the type, where the table's is another."""
    auto: str = ""
    """The auto class, where the kind's own is another."""
    image_tokens: int = 0
    """Of kind "multimodal": so many places of its text are an image's."""
    grid: bool = False
    """Whether the image is given as rows of patches, and a grid."""


def _dense() -> dict[str, TinyType]:
    types = {name: TinyType("text", DECODER) for name in DENSE}
    types["gemma4_text"] = TinyType("text", dict(
        DECODER, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        global_head_dim=16, num_kv_shared_layers=0))  # fmt: skip
    types["gpt_bigcode"] = TinyType("text", dict(
        n_embd=64, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=128, bos_token_id=1,
        eos_token_id=2, pad_token_id=0))  # fmt: skip
    types["gpt2"] = types["gpt_bigcode"]
    types["gptj"] = TinyType("text", dict(
        n_embd=64, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=128, rotary_dim=8,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False))  # fmt: skip
    types["codegen"] = types["gptj"]
    types["gpt_neo"] = TinyType("text", dict(
        hidden_size=64, num_layers=2, num_heads=4, vocab_size=VOCAB, max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2))  # fmt: skip
    types["opt"] = TinyType("text", dict(
        hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB,
        word_embed_proj_dim=64, max_position_embeddings=128))  # fmt: skip
    falcon = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB)
    types["falcon"] = TinyType("text", falcon)
    types["falcon_alibi"] = TinyType("text", dict(falcon, alibi=True), model_type="falcon")
    types["bloom"] = TinyType("text", dict(
        hidden_size=64, n_layer=3, n_head=4, vocab_size=VOCAB))  # fmt: skip
    types["mpt"] = TinyType("text", dict(
        d_model=64, n_heads=4, n_layers=3, max_seq_len=128, vocab_size=VOCAB))  # fmt: skip
    types["xglm"] = TinyType("text", dict(
        d_model=64, ffn_dim=96, num_layers=3, attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=128))  # fmt: skip
    types["gemma3n_text"] = TinyType("text", dict(
        DECODER, num_hidden_layers=4, vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, laurel_rank=8,
        intermediate_size=[96] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4))  # fmt: skip
    return types


def _mixtures() -> dict[str, TinyType]:
    types = {name: TinyType("text", {**DECODER, **EXPERTS}) for name in MIXTURES}
    latent = {**DECODER, **EXPERTS, **LATENT}
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        types[name] = TinyType("text", latent)
    types["longcat_flash"] = TinyType("text", dict(
        latent, num_layers=2, ffn_hidden_size=96, expert_ffn_hidden_size=24, zero_expert_num=2,
        moe_topk=2))  # fmt: skip
    types["lfm2_moe"] = TinyType("text", {
        **DECODER, **EXPERTS, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"]})  # fmt: skip
    return types


def _hybrids() -> dict[str, TinyType]:
    mixture = {**DECODER, **EXPERTS}
    mamba = dict(
        mamba_d_state=8, mamba_d_conv=4, mamba_expand=2, mamba_n_heads=8, mamba_d_head=16,
        mamba_n_groups=1, mamba_chunk_size=8,
    )  # fmt: skip
    types = {name: TinyType("text", {**mixture, **MIXED})
             for name in ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text")}  # fmt: skip
    types["falcon_h1"] = TinyType("text", dict(DECODER, mamba_d_ssm=128, **mamba))
    types["bamba"] = TinyType("text", dict(
        DECODER, attn_layer_indices=[1], **mamba))  # fmt: skip
    types["granitemoehybrid"] = TinyType("text", {
        **mixture, **mamba, "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 32})  # fmt: skip
    types["jamba"] = TinyType("text", dict(
        mixture, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
        expert_layer_period=2, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False))  # fmt: skip
    types["lfm2"] = TinyType("text", dict(DECODER, full_attn_idxs=[1]))
    types["mamba"] = TinyType("text", dict(
        hidden_size=64, num_hidden_layers=3, vocab_size=VOCAB, state_size=8))  # fmt: skip
    types["mamba2"] = TinyType("text", dict(
        hidden_size=64, num_hidden_layers=3, vocab_size=VOCAB, num_heads=8, head_dim=16,
        state_size=16, n_groups=1, expand=2, chunk_size=8))  # fmt: skip
    types["falcon_mamba"] = types["mamba"]
    types["rwkv"] = TinyType("text", dict(
        hidden_size=64, num_hidden_layers=3, vocab_size=VOCAB,
        attention_hidden_size=64))  # fmt: skip
    types["recurrent_gemma"] = TinyType("text", dict(
        DECODER, lru_width=64, attention_window_size=16, conv1d_width=4))  # fmt: skip
    types["nemotron_h"] = TinyType("text", dict(
        mixture, layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=8,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=8,
        moe_shared_expert_intermediate_size=24))  # fmt: skip
    types["zamba"] = TinyType("text", dict(
        DECODER, num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4, n_mamba_heads=2, use_mamba_kernels=False,
        attention_hidden_size=128, attention_head_dim=32))  # fmt: skip
    types["zamba2"] = TinyType("text", dict(
        DECODER, num_hidden_layers=4, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=8,
        mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, use_mem_rope=False, adapter_rank=8,
        attention_hidden_size=128, attention_head_dim=32,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]))  # fmt: skip
    return types


def _encoders() -> dict[str, TinyType]:
    types = {name: TinyType("words", ENCODER) for name in ENCODERS}
    types["modernbert"] = TinyType("words", dict(
        ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2))  # fmt: skip
    types["distilbert"] = TinyType("words", dict(
        dim=64, n_layers=3, n_heads=4, hidden_dim=96, vocab_size=VOCAB))  # fmt: skip
    types["albert"] = TinyType("words", dict(ENCODER, embedding_size=32))
    types["deberta-v2"] = TinyType("words", dict(
        ENCODER, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm"))  # fmt: skip
    types["esm"] = TinyType("words", dict(
        ENCODER, mask_token_id=3, position_embedding_type="rotary"))  # fmt: skip
    types["bert_head"] = TinyType("words", ENCODER, model_type="bert", auto="AutoModelForMaskedLM")
    return types


def _pairs() -> dict[str, TinyType]:
    types = {name: TinyType("text pair", BART) for name in PAIRS}
    for name in ("t5", "mt5", "umt5", "longt5"):
        types[name] = TinyType("text pair", T5)
    types["whisper"] = TinyType("speech", dict(
        BART, num_mel_bins=16, max_source_positions=50, max_target_positions=64,
        begin_suppress_tokens=None))  # fmt: skip
    types["speech_to_text"] = TinyType("speech", dict(
        BART, input_feat_per_channel=16, max_source_positions=100, max_target_positions=64,
        conv_channels=32, num_conv_layers=2))  # fmt: skip
    return types


def _seeing_and_hearing() -> dict[str, TinyType]:
    types = {name: TinyType("image", VISION) for name in TOWERS}
    types["beit"] = TinyType("image", dict(VISION, use_relative_position_bias=True))
    types["dinov2_swiglu"] = TinyType("image", dict(
        VISION, use_swiglu_ffn=True), model_type="dinov2")  # fmt: skip
    types["swin"] = TinyType("image", dict(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4))  # fmt: skip
    types["convnext"] = TinyType("image", dict(
        hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32))  # fmt: skip
    types["resnet"] = TinyType("image", dict(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]))  # fmt: skip
    for name in ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech"):
        types[name] = TinyType("wave", WAVE)
    tower = dict(VISION, num_hidden_layers=2)
    text = dict(ENCODER, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    types["clip"] = TinyType("image and text", dict(
        text_config=text, vision_config=tower, projection_dim=32))  # fmt: skip
    types["siglip"] = TinyType("image and text", dict(
        text_config=dict(text, projection_size=64), vision_config=tower))  # fmt: skip
    return types


def _multimodal() -> dict[str, TinyType]:
    tower = dict(VISION, num_hidden_layers=2)
    types = {}
    types["llava"] = TinyType("multimodal", dict(
        text_config=dict(DECODER, model_type="llama"),
        vision_config=dict(tower, model_type="clip_vision_model"),
        image_token_index=IMAGE_TOKEN), image_tokens=16)  # fmt: skip
    types["gemma3"] = TinyType("multimodal", dict(
        text_config=DECODER, vision_config=tower, mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN), image_tokens=4)  # fmt: skip
    types["paligemma"] = TinyType("multimodal", dict(
        text_config=dict(DECODER, model_type="gemma"), vision_config=tower, projection_dim=64,
        image_token_index=IMAGE_TOKEN), image_tokens=16)  # fmt: skip
    seen = dict(depth=2, hidden_size=64, intermediate_size=96, num_heads=4, out_hidden_size=64,
                embed_dim=64, mlp_ratio=2)  # fmt: skip
    rope = dict(DECODER, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]))  # fmt: skip
    marks = dict(image_token_id=IMAGE_TOKEN, vision_start_token_id=6, vision_end_token_id=7)
    deep = dict(seen, depth=3, deepstack_visual_indexes=[0, 1], patch_size=8,
                num_position_embeddings=16)  # fmt: skip
    for name, text_config, vision_config in (
        ("qwen2_vl", rope, dict(seen, patch_size=8)),
        ("qwen2_5_vl", rope, dict(seen, patch_size=8, fullatt_block_indexes=[1])),
        ("qwen3_vl", DECODER, deep),
        ("qwen3_vl_moe", {**DECODER, **EXPERTS}, deep),
    ):
        types[name] = TinyType("multimodal", dict(
            marks, text_config=text_config, vision_config=vision_config), image_tokens=4,
            grid=True)  # fmt: skip
    types["qwen2_audio"] = TinyType("multimodal", dict(
        text_config=dict(DECODER, model_type="qwen2"), audio_token_index=5,
        audio_config=dict(BART, num_mel_bins=16, max_source_positions=50)),
        auto="AutoModelForMultimodalLM")  # fmt: skip
    experts = {**EXPERTS, "moe_intermediate_size": [32, 16], "moe_num_experts": 4, "moe_k": 2}
    sections = dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])
    types["ernie4_5_vl_moe"] = TinyType("multimodal", dict(
        text_config=dict(DECODER, rope_parameters=sections, **experts),
        vision_config=dict(seen, spatial_merge_size=2)))  # fmt: skip
    types["mistral_large4"] = TinyType("multimodal", dict(
        text_config={**DECODER, **EXPERTS, **LATENT, "index_topk": 4, "index_head_dim": 16,
                     "index_n_heads": 2},
        vision_config=dict(tower, model_type="pixtral", head_dim=16)))  # fmt: skip
    types["inkling2"] = TinyType("multimodal", dict(
        text_config=dict(DECODER, unpadded_vocab_size=VOCAB, n_routed_experts=4, head_dim=16,
            swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, d_rel=4,
            rel_extent=16, moe_intermediate_size=32, num_experts_per_tok=2),
        vision_config=dict(tower, text_hidden_size=64, projection_hidden_dim=32)))  # fmt: skip
    return types


TYPES: dict[str, TinyType] = {
    **_dense(), **_mixtures(), **_hybrids(), **_encoders(), **_pairs(), **_seeing_and_hearing(),
    **_multimodal(),
}  # fmt: skip
"""All of them. What a release of transformers does not have, :func:`tiny_models.has` says."""
REPRESENTATIVE = [
    "llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "falcon", "mixtral", "qwen3_moe",
    "gpt_oss", "deepseek_v3", "granitemoe", "qwen3_next", "mamba2", "falcon_h1", "zamba2", "bert",
    "nomic_bert", "modernbert", "t5", "bart", "whisper", "wav2vec2", "vit", "dinov2_swiglu",
    "resnet", "clip", "llava", "qwen3_vl", "ernie4_5_vl_moe",
]  # fmt: skip
"""One of each kind of structure and of names, for what is run each time."""
