"""Tiny random diffusion transformers and autoencoders, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _at(step: float) -> torch.Tensor:
    return torch.tensor([step])


def _flux() -> Inputs:
    return dict(
        hidden_states=_drawn(1, 16, 4), encoder_hidden_states=_drawn(1, 8, 32),
        pooled_projections=_drawn(1, 32), timestep=_at(1.0), img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3))  # fmt: skip


def _qwen_image() -> Inputs:
    return dict(
        hidden_states=_drawn(1, 16, 16), encoder_hidden_states=_drawn(1, 7, 16),
        encoder_hidden_states_mask=torch.ones(1, 7).long(), timestep=_at(1.0),
        img_shapes=[(1, 4, 4)])  # fmt: skip


def _hunyuan_video() -> Inputs:
    return dict(
        hidden_states=_drawn(1, 4, 1, 16, 16), encoder_hidden_states=_drawn(1, 12, 16),
        pooled_projections=_drawn(1, 8), encoder_attention_mask=torch.ones(1, 12),
        guidance=_at(1.0), timestep=_at(1.0))  # fmt: skip


def _ltx() -> Inputs:
    return dict(
        hidden_states=_drawn(1, 16, 4), encoder_hidden_states=_drawn(1, 12, 16), timestep=_at(1),
        encoder_attention_mask=torch.ones(1, 12).bool(), num_frames=1, height=4,
        width=4)  # fmt: skip


def _sd3() -> Inputs:
    return dict(
        hidden_states=_drawn(1, 4, 32, 32), encoder_hidden_states=_drawn(1, 8, 32),
        pooled_projections=_drawn(1, 64), timestep=_at(1))  # fmt: skip


def _wan() -> Inputs:
    return dict(
        hidden_states=_drawn(1, 4, 2, 16, 16), encoder_hidden_states=_drawn(1, 12, 16),
        timestep=_at(1))  # fmt: skip


DIFFUSERS: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "FluxTransformer2DModel": (dict(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8]), _flux),
    "QwenImageTransformer2DModel": (dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4)), _qwen_image),
    "WanTransformer3DModel": (dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=256, ffn_dim=32, num_layers=3, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32), _wan),
    "HunyuanVideoTransformer3DModel": (dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_single_layers=3, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4)), _hunyuan_video),
    "LTXVideoTransformer3DModel": (dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=3, qk_norm="rms_norm_across_heads",
        caption_channels=16), _ltx),
    "SD3Transformer2DModel": (dict(
        sample_size=32, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4), _sd3),
    "AutoencoderKL": (dict(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4),
        lambda: dict(sample=_drawn(1, 3, 16, 16))),
}  # fmt: skip
"""By the name of the class: what it is made with, and what its forward takes."""


def tiny_diffuser(name: str, seed: int = 0) -> nn.Module:
    """One of them on the CPU, for inference; every parameter holds numbers of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _class(name)(**DIFFUSERS[name][0]).eval()
        for tensor in model.parameters():
            tensor.data += 0.02 * torch.rand_like(tensor)
    return model


def tiny_diffuser_on_meta(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same without weights."""
    with torch.device("meta"):
        return _class(name)(**DIFFUSERS[name][0]).eval().to(dtype)


def run_diffuser(name: str, model: nn.Module) -> torch.Tensor:
    """What its forward gives; on the CPU."""
    device: Any = model.device
    given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in DIFFUSERS[name][1]().items()}
    with torch.no_grad():
        out: torch.Tensor = model(**given, return_dict=False)[0]
    return out.cpu()


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)
