"""What a pipeline with streamed components cannot do: one clear error each, nothing half-done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import StreamerError

_WORDS = {
    **dict.fromkeys(
        ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
        "its large components stream already, in what device_budget= says",
    ),
    "save_pretrained": "there is nothing to save of what streams: the checkpoint has it",
    "fuse_lora": "streamed weights cannot be changed: adapters work beside them",
}
"""By name of a method, why it is refused."""


def refuse(pipe: Any, streamed: Mapping[str, nn.Module]) -> None:
    """Have the pipeline, and ``streamed`` components where they have such methods, say so; and
    ``to`` lead nowhere else, before anything is moved."""
    for name, words in _WORDS.items():
        if hasattr(pipe, name):
            pipe.__dict__[name] = _refusal(f"{type(pipe).__name__}.{name}: {words}")
    for component, module in streamed.items():
        for name in ("enable_group_offload", "fuse_lora"):
            if hasattr(module, name):
                module.__dict__[name] = _refusal(f"{component}.{name}: {_WORDS[name]}")
    pipe.__dict__["to"] = _to_of(pipe, streamed)


def _refusal(words: str) -> Callable[..., NoReturn]:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise StreamerError(words)

    return refused


def _to_of(pipe: Any, streamed: Mapping[str, nn.Module]) -> Callable[..., Any]:
    """The pipeline's ``to``: streamed components are asked first, which refuse to leave."""
    known = weakref.ref(pipe)
    modules = {name: weakref.ref(module) for name, module in streamed.items()}

    def to(*args: Any, **kwargs: Any) -> Any:
        found = known()
        assert found is not None
        asked = {k: v for k, v in kwargs.items() if k in ("device", "dtype") and v is not None}
        wanted = [torch.device(arg) if isinstance(arg, str) else arg for arg in args if arg]
        for name, reference in modules.items():
            module = reference()
            if module is not None and getattr(found, name, None) is module and (wanted or asked):
                _stay(name, module, wanted, asked)
        return type(found).to(found, *args, **kwargs)

    return to


def _stay(name: str, module: Any, wanted: Sequence[Any], asked: Mapping[str, Any]) -> None:
    """StreamerError if that would move or cast the component."""
    try:
        module.to(*wanted, **asked)
    except StreamerError as error:
        error.args = (f"{name}: {error}",)
        raise
