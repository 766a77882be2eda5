"""Tiny random models of the types in :mod:`tiny_types`, on real memory, and what they answer."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from tiny_types import IMAGE_TOKEN, REPRESENTATIVE, TYPES, VOCAB, TinyType
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE = (1, 3, 32, 32)
AUTO = {
    "text": "AutoModelForCausalLM",
    "text pair": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
    "multimodal": "AutoModelForImageTextToText",
}
"""By kind; AutoModel for the rest."""


def has(name: str) -> bool:
    """Whether the installed transformers knows the type."""
    return (TYPES[name].model_type or name) in CONFIG_MAPPING


def tiny_config(name: str) -> Any:
    """A new configuration of the type."""
    found = TYPES[name]
    return CONFIG_MAPPING[found.model_type or name](**copy.deepcopy(found.config))


def tiny_class(name: str) -> Any:
    """The auto class that makes it and loads it."""
    found = TYPES[name]
    return getattr(transformers, found.auto or AUTO.get(found.kind, "AutoModel"))


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """A model of the type for inference, on the CPU, float32; every parameter and every persistent
    buffer holds numbers of its own, so that none can stand for another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = tiny_class(name).from_config(tiny_config(name)).eval()
        stirred = {id(t): t for t in model.state_dict(keep_vars=True).values()}
        for tensor in stirred.values():
            if tensor.is_floating_point():
                # Upwards: variances and time constants stay positive.
                tensor.data += 0.02 * torch.rand_like(tensor)
    return model


def tiny_model_on_meta(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same without weights: on the meta device, with its non-persistent buffers, too."""
    with torch.device("meta"):
        model: nn.Module = tiny_class(name).from_config(tiny_config(name), dtype=dtype).eval()
    return model


def tiny_inputs(name: str) -> dict[str, torch.Tensor]:
    """What a forward of the type takes."""
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(8, VOCAB, (1, 9), generator=made)
    kind = TYPES[name].kind
    if TYPES[name].image_tokens:
        return _with_image(TYPES[name], ids, made)
    if kind in ("text", "words", "multimodal"):
        return {"input_ids": ids}
    if kind == "text pair":
        return {"input_ids": ids, "decoder_input_ids": ids}
    if kind == "speech":
        frames = (1, 16, 100) if name == "whisper" else (1, 100, 16)
        sound = torch.randn(frames, generator=made)
        return {"input_features": sound, "decoder_input_ids": ids}
    if kind == "wave":
        return {"input_values": torch.randn(1, 400, generator=made)}
    image = {"pixel_values": torch.randn(IMAGE, generator=made)}
    return image if kind == "image" else {"input_ids": ids, **image}


def _with_image(
    found: TinyType, ids: torch.Tensor, made: torch.Generator
) -> dict[str, torch.Tensor]:
    places = torch.full((1, found.image_tokens), IMAGE_TOKEN)
    inputs = {"input_ids": torch.cat([ids[:, :3], places, ids[:, 3:]], 1)}
    types = (inputs["input_ids"] == IMAGE_TOKEN).to(torch.int64)
    if not found.grid:
        return {**inputs, "pixel_values": torch.randn(IMAGE, generator=made)}
    # 4 x 4 patches of 8 x 8 pixels, each twice, as of a film.
    patches = torch.randn(16, 3 * 2 * 8 * 8, generator=made)
    grid = torch.tensor([[1, 4, 4]])
    return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}


def run(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """What a forward gives, and for what generates six tokens, drawn greedily; on the CPU."""
    device: Any = model.device
    inputs = {key: value.to(device) for key, value in tiny_inputs(name).items()}
    with torch.no_grad():
        out = model(**inputs)
        answers = {key: value.cpu() for key, value in out.items() if torch.is_tensor(value)}
        if TYPES[name].kind in ("text", "text pair", "speech", "multimodal"):
            given = {key: v for key, v in inputs.items() if not key.startswith("decoder_")}
            tokens = model.generate(  # type: ignore[operator]
                **given, do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0
            )
            answers["tokens"] = tokens.cpu()
    return answers


__all__ = [
    "REPRESENTATIVE", "TYPES", "TinyType", "has", "run", "tiny_class", "tiny_config",
    "tiny_inputs", "tiny_model", "tiny_model_on_meta",
]  # fmt: skip


def least(model: Any, ahead: int) -> int:
    """Bytes of device memory that hold a streamed model with one slot, and as many ``ahead``."""
    plan = model.layer_streamer.plan
    slots = [max(size.device_nbytes for size in p.sizes) for p in plan.sequences.values()]
    return int(plan.outside_nbytes + (1 + ahead) * sum(slots))
