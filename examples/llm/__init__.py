"""A language model engine over streamed layers, on the public surface of layer_streamer.

Copy what you need: only ``StreamingEngine`` is a promise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import StreamingEngine

__all__ = ["StreamingEngine"]


def __getattr__(name: str) -> Any:  # imported when it is asked for: --help need not wait for torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".engine", __name__), name)
