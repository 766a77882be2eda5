"""Peers that bring one layer's weights at a time: the model is computed here, alike for all."""

from __future__ import annotations
import __future__

import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .device import hold_to_limit, weights_budget
from .session import Asked

LayerFn = Callable[[torch.Tensor, Mapping[str, torch.Tensor], int], torch.Tensor]
RunPass = Callable[[torch.Tensor, LayerFn], torch.Tensor]


class LayerSession:
    """transformers' own layers, without weights of their own, and a cache of transformers."""

    def __init__(
        self, asked: Asked, run_pass: RunPass, static: Callable[[str], torch.Tensor], embed: Any
    ) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(asked.folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
        self._layers, self._rotary = model.model.layers, type(model.model.rotary_emb)(config)
        self._rotary.to(asked.device)
        self._eps, self._device = config.rms_norm_eps, asked.device
        self._run_pass, self._embed = run_pass, embed
        self._norm = static("model.norm.weight")
        tied = config.tie_word_embeddings
        self._head = static("model.embed_tokens.weight" if tied else "lm_head.weight")
        self._new_cache = transformers.DynamicCache
        self._cache: Any = None

    def prompt(self, ids: list[int]) -> int:
        self._cache = self._new_cache()
        return self._forward(ids)

    def step(self, token: int) -> int:
        return self._forward([token])

    @torch.no_grad()
    def _forward(self, ids: list[int]) -> int:
        x = self._embed[torch.tensor(ids, device=self._embed.device)].to(self._device)[None]
        past = self._cache.get_seq_length()
        positions_1T = torch.arange(past, past + len(ids), device=self._device)[None]
        rotation = self._rotary(x, positions_1T)

        def layer_fn(
            x: torch.Tensor, weights: Mapping[str, torch.Tensor], layer_idx: int
        ) -> torch.Tensor:
            named = {
                "past_key_values": self._cache,
                "position_ids": positions_1T,
                "position_embeddings": rotation,
                "use_cache": True,
            }
            layer = self._layers[layer_idx]
            out = torch.func.functional_call(layer, dict(weights), (x,), named)
            return out[0] if isinstance(out, tuple) else out

        x = self._run_pass(x, layer_fn)[:, -1]
        x = F.rms_norm(x, x.shape[-1:], self._norm, self._eps)
        return int(F.linear(x, self._head).argmax())


def layer_streamer_pass(asked: Asked) -> LayerSession:
    """Ours: ``run_pass``, the head on the device, rows of the embedding from host memory."""
    from layer_streamer import LayerStreamer

    budget = weights_budget(asked, hold_to_limit(asked))
    options: dict[str, Any] = {"device": asked.device}
    if budget is not None:
        config = json.loads((asked.folder / "config.json").read_text())
        head = 2 * config["vocab_size"] * config["hidden_size"]
        options |= {"device_budget": budget, "reserve_bytes": head}
    streamer = LayerStreamer.from_checkpoint(asked.folder, **options)
    embed = streamer.host_tensor("model.embed_tokens.weight")
    return LayerSession(asked, streamer.run_pass, streamer.load_static, embed)


class Deferred(importlib.machinery.SourceFileLoader):
    """Loads a module whose annotations are not evaluated, as is the rule from Python 3.14 on."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)  # what was compiled before is not asked for
        flags = __future__.annotations.compiler_flag
        return compile(self.get_data(path), path, "exec", flags, dont_inherit=True)


class DeferredFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of one package so."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found and found.origin and fullname.partition(".")[0] == "layer_streamer":
            found.loader = Deferred(fullname, found.origin)
            return found
        return None


def llm_layer_prefetch(asked: Asked) -> LayerSession:
    """llm-layer-prefetch, with the settings of its README; embedding and head on the device."""
    asked.need_cuda()
    sys.meta_path.insert(0, DeferredFinder())
    from layer_streamer import LayerStreamer

    hold_to_limit(asked)
    tensors, begins = headers(asked.folder)
    prefix = "model.layers.0."
    keys = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    counts = {key: torch.Size(tensors[prefix + key][2]).numel() for key in keys}
    num_layers = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    given: dict[str, Any] = {
        "model_dir": str(asked.folder),
        "tensor_info": tensors,
        "shard_offsets": begins,
        "block_keys": keys,
        "block_sizes": counts,
        "dtype": torch.bfloat16,
        "num_layers": num_layers,
        "n_gpu": 2,
        "n_cpu_pinned": 4,
        "n_cpu": 4,
        "batch_gpu": 1,
        "batch_cpu_pinned": 1,
        "batch_cpu": 2,
        "track_progress": False,
    }
    streamer = LayerStreamer(**given)
    embed = streamer.load_static("model.embed_tokens.weight")
    return LayerSession(asked, streamer.run_pass, streamer.load_static, embed)


def headers(folder: Path) -> tuple[dict[str, tuple[str, int, tuple[int, ...]]], dict[str, int]]:
    """Of each tensor its file, its offset there and its shape; of each file where data begins."""
    tensors, begins = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        begins[path.name] = 8 + length
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = (path.name, entry["data_offsets"][0], tuple(entry["shape"]))
    return tensors, begins
