"""Peers that run a model of transformers as it is, each with a way of its own to bring weights."""

from __future__ import annotations

from typing import Any

import torch

from .device import RESERVE, hold_to_limit, total_memory, weights_budget
from .session import Asked, SkipError


class ModelSession:
    """A causal language model of transformers, with its own cache."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device, self._cache = model, device, None

    def prompt(self, ids: list[int]) -> int:
        self._cache = None
        return self._forward(ids)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, ids: list[int]) -> int:
        ids_1T = torch.tensor([ids], device=self._device)
        with torch.no_grad():
            out = self._model(ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


def load(asked: Asked, **options: Any) -> Any:
    """The model as transformers loads it, in the checkpoint's dtype."""
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(asked.folder, dtype="auto", **options)
    return found.eval()


def transformers_resident(asked: Asked) -> ModelSession:
    """All weights on the device: what streaming is beside, not held to the limit."""
    torch.set_num_threads(asked.threads)
    nbytes = sum(file.stat().st_size for file in asked.folder.glob("*.safetensors"))
    if asked.cuda and nbytes > torch.cuda.mem_get_info(asked.device)[0]:
        raise SkipError("the model is larger than the device")
    return ModelSession(load(asked).to(asked.device), asked.device)


def accelerate_map(asked: Asked) -> ModelSession:
    """device_map="auto": what fits stays on the device, the rest in host memory."""
    import accelerate  # noqa: F401

    asked.need_cuda()
    budget = weights_budget(asked, hold_to_limit(asked))
    memory = {0: total_memory(asked) if budget is None else budget, "cpu": 1 << 50}
    model = load(asked, device_map="auto", max_memory=memory)
    return ModelSession(model, asked.device)


def accelerate_cpu(asked: Asked) -> ModelSession:
    """cpu_offload: all weights in host memory."""
    from accelerate import cpu_offload

    asked.need_cuda()
    hold_to_limit(asked)
    model = load(asked)
    cpu_offload(model, execution_device=torch.device(asked.device))
    return ModelSession(model, asked.device)


def accelerate_disk(asked: Asked) -> ModelSession:
    """disk_offload: all weights in files that it writes."""
    from accelerate import disk_offload

    hold_to_limit(asked)
    model = load(asked)
    disk_offload(model, str(asked.work), execution_device=torch.device(asked.device))
    return ModelSession(model, asked.device)


def diffusers_groups(asked: Asked, kind: str) -> ModelSession:
    """Group offloading of leaves or blocks, with a stream; all weights in host memory."""
    from diffusers.hooks import apply_group_offloading

    asked.need_cuda()
    hold_to_limit(asked)
    model = load(asked)
    apply_group_offloading(
        model,
        onload_device=torch.device(asked.device),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        use_stream=True,
    )
    return ModelSession(model, asked.device)


def diffusers_leaf(asked: Asked) -> ModelSession:
    return diffusers_groups(asked, "leaf_level")


def diffusers_block(asked: Asked) -> ModelSession:
    return diffusers_groups(asked, "block_level")


def airllm(asked: Asked) -> ModelSession:
    """AirLLM, which writes a copy of the model, a file a layer."""
    import airllm as package

    class WithoutTokenizer(package.AirLLMBaseModel):  # type: ignore[misc,unused-ignore]
        def get_tokenizer(self, hf_token: object = None) -> None:
            return None

    hold_to_limit(asked)
    found = WithoutTokenizer(
        str(asked.folder), device=asked.device, layer_shards_saving_path=str(asked.work)
    )
    return ModelSession(found.model, asked.device)


def flextensor(asked: Asked) -> ModelSession:
    """FlexTensor, past the passes in which it looks and measures; the blocks are its part."""
    import flextensor as package

    asked.need_cuda()
    budget = weights_budget(asked, hold_to_limit(asked))
    share = None if budget is None else budget / total_memory(asked)
    config = package.OffloadConfig(include_patterns=["model.layers.*"], max_gpu_mem_fraction=share)
    model = load(asked)
    for name, module in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        if name != "layers":
            module.to(asked.device)
    session = ModelSession(package.offload(model, config), asked.device)
    for _ in range(package.get_offload_manager().iters_before_inference + 1):
        session.prompt([10])
    return session


def layer_streamer_model(asked: Asked) -> ModelSession:
    """Ours, as the model itself: ``stream(model)``."""
    import layer_streamer as ls

    budget = hold_to_limit(asked)
    options: dict[str, Any] = {"device": asked.device}
    if budget is not None:
        options |= {"device_budget": budget, "reserve_bytes": RESERVE}
    model: Any = ls.stream(asked.folder, **options)
    return ModelSession(model, asked.device)
