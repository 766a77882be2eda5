"""LoRA weights are loaded by a pipeline's own loader, which looks at its components' states."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def let_adapters_load(pipe: Any, streamed: Mapping[str, nn.Module]) -> None:
    """Have ``load_lora_weights`` find the shapes that it asks for in ``state_dict()``, which
    streamed components refuse elsewhere: there streamed weights are on meta."""
    if not hasattr(pipe, "load_lora_weights"):
        return
    known = weakref.ref(pipe)
    modules = [weakref.ref(module) for module in streamed.values()]

    def load_lora_weights(*args: Any, **kwargs: Any) -> Any:
        found = known()
        assert found is not None
        with ExitStack() as states:
            for reference in modules:
                module = reference()
                if module is not None:
                    states.enter_context(_state_without_values(module))
            return type(found).load_lora_weights(found, *args, **kwargs)

    pipe.__dict__["load_lora_weights"] = load_lora_weights


@contextmanager
def _state_without_values(module: nn.Module) -> Iterator[None]:
    refused = module.__dict__.pop("state_dict", None)
    try:
        yield
    finally:
        if refused is not None:
            module.__dict__["state_dict"] = refused
