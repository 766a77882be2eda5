"""The errors that the engine raises on purpose: each is a StreamerError, in one line.

What others' code raises while the engine uses it (tokenizers, torch, threads) is told by these, so
that whoever calls the engine, or reads what a command says, meets no traceback of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from layer_streamer import StreamerError


class UnsupportedModelError(StreamerError, ValueError):
    """The model, or a part of it, is not one that this engine can compute."""


class PromptTooLongError(StreamerError, ValueError):
    """The prompt leaves no room for a single token in the context that was granted."""


class ConstraintError(StreamerError, ValueError):
    """A schema, a regular expression or a grammar is wrong, and where; or no text of this model's
    tokenizer can be held to any."""


class NotFiniteError(StreamerError, ValueError):
    """A row's logits are not numbers: names the pass, and the first layer whose output was not."""


class EngineError(StreamerError):
    """What a tokenizer, torch or the machine refused; ``__cause__`` is what it raised."""


class QueueFullError(StreamerError):
    """As many requests wait as may: this one was not taken."""


class RowsError(StreamerError, ValueError):
    """Prompts of a list that ended in errors, raised when all others had ended."""

    def __init__(self, errors: Mapping[int, Exception], completions: Sequence[Any] = ()) -> None:
        first, error = min(errors.items(), key=lambda item: item[0])
        more = f" ({len(errors) - 1} more of them failed)" if len(errors) > 1 else ""
        super().__init__(f"prompt {first} of the list: {error}{more}")
        self.errors = dict(errors)
        """By the prompt's place in the list."""
        self.completions = tuple(completions)
        """Of all prompts, in their order, where they were not streamed; what failed has its
        ``error``."""


TELLING = (StreamerError, ValueError, OSError, ImportError)
"""Errors that say by themselves, in a line, what is wrong."""


@contextmanager
def one_line_errors(doing: str, kind: type[Exception] = EngineError) -> Iterator[None]:
    """Context for the code of others: what it raises comes out as one of TELLING, in one line.

    ``kind`` is what all else becomes, with ``doing`` before its message. Interrupts stay.
    """
    try:
        yield
    except BaseException as error:
        told = told_in_one_line(error, doing, kind)
        if told is error:
            raise
        raise told from error


def told_in_one_line(
    error: BaseException, doing: str, kind: type[Exception] = EngineError
) -> BaseException:
    """The error itself if it is an interrupt, or one of TELLING in one line; else one of ``kind``
    that tells it."""
    if not isinstance(error, Exception) and not is_panic(error):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, TELLING):
        if "\n" not in str(error):
            return error
        return kind(f"{doing}: {text}")
    name = type(error).__name__
    return kind(f"{doing}: {name}: {text}" if text else f"{doing}: {name}")


def is_panic(error: BaseException) -> bool:
    """True for a panic of a package that is written in Rust, such as tokenizers: it is no
    Exception, and its class can be imported from nowhere."""
    return type(error).__module__ == "pyo3_runtime"


def without_frames(error: Exception) -> Exception:
    """The error, to be kept: frames would keep tensors with it."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


@contextmanager
def optional_packages(extra: str = "llm") -> Iterator[None]:
    """Context in which packages are used that only the engine needs: an ImportError says how they
    are installed."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(f"{reason} (pip install 'layer-streamer[{extra}]')") from error
