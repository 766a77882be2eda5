"""Tiny random pipelines of diffusers, resident and streamed, and what they draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from assets import one_torch_thread
from recipes import quiet

from layer_streamer import stream

DIM = 32
WORDS = ("<pad>", "<unk>", "<s>", "</s>", "a", "cat", "sat", "on", "the", "mat")
PROMPT = "a cat on the mat"


def save_pipeline(name: str, folder: Path, **without: None) -> None:
    """One of ``PIPELINES`` as a folder; ``without`` some of its components."""
    import diffusers

    parts = {**PIPELINES[name](), **without}
    getattr(diffusers, name)(**parts).save_pretrained(folder)


def picture(pipe: Any, seed: int = 0, **more: Any) -> torch.Tensor:
    """What a pipeline draws in two steps, as numbers."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    if type(pipe).__name__ != "StableDiffusionXLPipeline":
        options["max_sequence_length"] = 8
    if type(pipe).__name__ == "WanPipeline":
        options["num_frames"] = 5
    noise = torch.Generator().manual_seed(seed)
    (drawn,) = pipe(PROMPT, generator=noise, return_dict=False, **{**options, **more})
    return torch.as_tensor(drawn)


@contextmanager
def streamed(folder: Path, **options: Any) -> Iterator[Any]:
    """One that streams on the CPU, through few slots."""
    with quiet(), one_torch_thread():
        few = {"n_gpu": 1, "n_cpu_pinned": 0}
        pipe: Any = stream(folder, device="cpu", **{**few, **options})
        yield pipe
        pipe.layer_streamer.close()


def taken(plan: Any) -> int:
    """Bytes of device memory that a plan takes, by all that it says."""
    sequences = [p for c in plan.components.values() for p in c.sequences.values()]
    slots = sum(sum(p.placement.device_bytes) for p in sequences)
    outside = sum(c.outside_nbytes for c in plan.components.values())
    return slots + outside + sum(plan.resident_nbytes.values())


def tiers(plan: Any, component: str) -> set[str]:
    """Where its blocks live."""
    return {tier for p in plan.components[component].sequences.values() for tier in p.tiers}


def held(plan: Any, component: str) -> int:
    """Bytes of blocks that are resident."""
    sequences = plan.components[component].sequences.values()
    return sum(
        size.device_nbytes
        for p in sequences
        for size, tier in zip(p.sizes, p.tiers, strict=True)
        if tier == "device"
    )


def _flux() -> dict[str, Any]:
    return {
        "scheduler": _scheduler(),
        "vae": _vae(latent_channels=4),
        "text_encoder": _clip("CLIPTextModel"),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _t5("T5EncoderModel"),
        "tokenizer_2": _tokenizer(),
        "transformer": _model(
            "FluxTransformer2DModel", patch_size=1, in_channels=16, num_layers=4,
            num_single_layers=5, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=DIM, pooled_projection_dim=DIM, axes_dims_rope=[4, 4, 8],
        ),
    }  # fmt: skip


def _sd3() -> dict[str, Any]:
    return {
        "scheduler": _scheduler(),
        "vae": _vae(latent_channels=4),
        "text_encoder": _clip("CLIPTextModelWithProjection"),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _clip("CLIPTextModelWithProjection"),
        "tokenizer_2": _tokenizer(),
        "text_encoder_3": _t5("T5EncoderModel", 2 * DIM),
        "tokenizer_3": _tokenizer(),
        "transformer": _model(
            "SD3Transformer2DModel", sample_size=8, patch_size=1, in_channels=4, num_layers=5,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=DIM,
            joint_attention_dim=2 * DIM, pooled_projection_dim=2 * DIM, out_channels=4,
        ),
    }  # fmt: skip


def _sdxl() -> dict[str, Any]:
    import diffusers

    return {
        "scheduler": diffusers.EulerDiscreteScheduler(),
        "vae": _vae(latent_channels=4, shift_factor=None),
        "text_encoder": _clip("CLIPTextModel"),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _clip("CLIPTextModelWithProjection"),
        "tokenizer_2": _tokenizer(),
        "unet": _model(
            "UNet2DConditionModel", block_out_channels=(32, 64), sample_size=8, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=[2, 4],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
            transformer_layers_per_block=[1, 4], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + DIM, cross_attention_dim=2 * DIM,
        ),
    }  # fmt: skip


def _wan() -> dict[str, Any]:
    sizes = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=DIM, freq_dim=256, ffn_dim=32, num_layers=5, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return {
        "scheduler": _scheduler(),
        "vae": _model(
            "AutoencoderKLWan", base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        "text_encoder": _t5("UMT5EncoderModel"),
        "tokenizer": _tokenizer(),
        "transformer": _model("WanTransformer3DModel", **sizes),
        "transformer_2": _model("WanTransformer3DModel", seed=9, **sizes),
        "boundary_ratio": 0.9,
    }  # fmt: skip


PIPELINES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "StableDiffusionXLPipeline": _sdxl,
    "WanPipeline": _wan,
}
"""By the name of the class: what it is made of."""


def _tokenizer() -> Any:
    """Of a few words, without a download."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", model_max_length=8,
    )  # fmt: skip


def _scheduler() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


def _vae(latent_channels: int, shift_factor: float | None = 0.06) -> Any:
    return _model(
        "AutoencoderKL", block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=latent_channels,
        norm_num_groups=4, shift_factor=shift_factor, scaling_factor=1.5, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip


def _model(name: str, seed: int = 5, **sizes: Any) -> Any:
    import diffusers

    return _drawn(lambda: getattr(diffusers, name)(**sizes), seed)


def _clip(name: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=DIM, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=4, projection_dim=DIM, max_position_embeddings=8, bos_token_id=2,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return _drawn(lambda: getattr(transformers, name)(config), 6)


def _t5(name: str, dim: int = DIM) -> Any:
    import transformers

    kind = transformers.T5Config if name == "T5EncoderModel" else transformers.UMT5Config
    config = kind(
        vocab_size=len(WORDS), d_model=dim, d_kv=8, d_ff=64, num_layers=5, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return _drawn(lambda: getattr(transformers, name)(config), 7)


def _drawn(make: Callable[[], Any], seed: int) -> Any:
    """A model whose every parameter holds numbers of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        for tensor in model.parameters():
            tensor.data += 0.02 * torch.rand_like(tensor)
    return model
