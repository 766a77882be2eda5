"""The errors that say no to a model, and to a machine that lacks a package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not one that this engine can compute."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for a single token in the context that was granted."""


@contextmanager
def optional_packages() -> Iterator[None]:
    """Context in which packages are used that only the engine needs: an ImportError says how they
    are installed."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(f"{reason} (pip install 'layer-streamer[llm]')") from error
