"""Peers that are engines: they keep rows, keys and values themselves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from .device import hold_to_limit, total_memory, weights_budget
from .session import LEAST, Asked, SkipError


class EngineSession:
    """Ours. No token ends a row."""

    def __init__(self, engine: Any, tokens: int) -> None:
        engine._stop_ids = frozenset()
        engine._has_text = lambda needed=False: False
        self._engine, self._tokens = engine, tokens
        self._events: Any = None

    def prompt(self, ids: list[int]) -> int:
        if self._events is not None:
            self._events.close()
        self._events = self._engine.events([ids], max_new_tokens=self._tokens + 1, temperature=0)
        return self.step(0)

    def step(self, token: int) -> int:
        request, _ = next(self._events)
        return int(request.new_ids[-1])


def layer_streamer_engine(asked: Asked) -> EngineSession:
    """Ours, on the folder or on the GGUF file."""
    from layer_streamer.llm import StreamingEngine

    options: dict[str, Any] = {"device": asked.device, "device_budget": hold_to_limit(asked)}
    if asked.checkpoint.is_dir() and asked.device != "cpu":  # as others compute; else it decides
        options["dtype"] = getattr(torch, dtype_of(asked.checkpoint))
    length = asked.prompt + asked.tokens + 1
    engine = StreamingEngine(asked.checkpoint, max_length=length, max_batch=1, **options)
    return EngineSession(engine, asked.tokens)


def dtype_of(folder: Path) -> str:
    """What the weights are stored in, by the config."""
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config["torch_dtype"])


def vllm(asked: Asked) -> dict[str, Any]:
    """vLLM with what the limit does not hold in host memory (``cpu_offload_gb``)."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    asked.need_cuda()
    options: dict[str, Any] = {"gpu_memory_utilization": 0.9}
    if asked.device_nbytes is not None:
        nbytes = sum(file.stat().st_size for file in asked.folder.glob("*.safetensors"))
        over = nbytes - (weights_budget(asked, asked.device_nbytes) or 0)
        options["cpu_offload_gb"] = max(over, 0) / (1 << 30)
        options["gpu_memory_utilization"] = asked.device_nbytes / total_memory(asked)
    begin = time.perf_counter()
    model = LLM(
        str(asked.folder),
        skip_tokenizer_init=True,
        max_model_len=asked.prompt + asked.tokens + 1,
        **options,
    )
    opened = time.perf_counter() - begin

    def seconds(turn: int, tokens: int) -> float:
        asks = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        model.generate(TokensPrompt(prompt_token_ids=asked.prompt_ids(turn)), asks, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(0, LEAST)
    first, all_of_it = seconds(1, 1), seconds(2, asked.tokens + 1)
    each = (all_of_it - first) / asked.tokens
    return {
        "open_seconds": opened,
        "first_token": first,
        "seconds_per_pass": each,
        "tokens_per_second": 1 / each,
    }


class ExllamaSession:
    """exllamav3, everything on the device."""

    def __init__(self, model: Any, cache: Any, length: int) -> None:
        self._model, self._cache, self._length, self._past = model, cache, length, 0

    def prompt(self, ids: list[int]) -> int:
        self._past = 0
        return self._forward(ids)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, ids: list[int]) -> int:
        params = {
            "attn_mode": "flash_attn",
            "cache": self._cache,
            "past_len": self._past,
            "batch_shape": (1, self._length),
        }
        logits = self._model.forward(torch.tensor([ids]), params)
        self._past += len(ids)
        return int(logits[0, -1].argmax())


def exllamav3(asked: Asked) -> ExllamaSession:
    """exllamav3 with all weights on the device, not held to the limit."""
    from exllamav3 import Cache, Config, Model  # type: ignore[import-not-found]

    asked.need_cuda()
    nbytes = sum(file.stat().st_size for file in asked.folder.glob("*.safetensors"))
    if nbytes > torch.cuda.mem_get_info(asked.device)[0]:
        raise SkipError("the model is larger than the device")
    length = -(-(asked.prompt + asked.tokens + 1) // 256) * 256
    model = Model.from_config(Config.from_directory(str(asked.folder)))
    cache = Cache(model, max_num_tokens=length)
    model.load(asked.device)
    return ExllamaSession(model, cache, length)
