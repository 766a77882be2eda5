"""What went wrong in a trial's child, in words."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from types import TracebackType

import torch

from .record import Ending

MAX_DETAIL = 8000
"""Characters of a traceback that are kept: its beginning and, more of it, its end."""
HEAD = 2000
MAX_LINE = 500
"""Of the first line."""

_NO_MEMORY = re.compile(
    r"out of memory|std::bad_alloc|can't allocate memory|not enough memory|cannot allocate memory"
    r"|cudaErrorMemoryAllocation|CUDA error 2\b|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""How torch, CUDA and its libraries say it where they raise a RuntimeError."""


def describe(error: BaseException, stage: str, caller: str) -> tuple[Ending, str]:
    """How a trial ended that met ``error``, and its detail: one line, then the traceback.

    ``caller``: the file whose calls at the beginning of the traceback tell nobody anything.
    """
    ending: Ending = "exception"
    if any(_is_no_memory(cause) for cause in _causes(error)):
        ending = "out of memory"
    elif isinstance(error, SystemExit):
        ending = "exit"
    try:
        line = " ".join([f"{type(error).__name__}:", *str(error).split()])
        trace = _without(error.__traceback__, caller)
        lines = "".join(traceback.format_exception(type(error), error, trace))
    except Exception as fault:  # an error of the candidate's own that cannot be printed
        line = f"{type(error).__name__}: (its message cannot be had: {type(fault).__name__})"
        lines = ""
    if len(lines) > MAX_DETAIL:
        left_out = f"[{len(lines) - MAX_DETAIL} characters left out]"
        lines = f"{lines[:HEAD]}\n{left_out}\n{lines[HEAD - MAX_DETAIL :]}"
    return ending, f"{line[:MAX_LINE]} (in stage {stage!r})\n{lines}".rstrip()


def _without(trace: TracebackType | None, caller: str) -> TracebackType | None:
    """The traceback from where it leaves the file ``caller``; whole if it ends there."""
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename == caller:
        inner = inner.tb_next
    return trace if inner is None else inner


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen = set[int]()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _is_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
