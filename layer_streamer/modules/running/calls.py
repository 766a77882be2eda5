"""Which modules a thread is calling just now, by its frames: for where nothing else can tell."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType

from torch import nn

_CALL = nn.Module._call_impl.__code__


def computes(thread: int) -> bool:
    """True if the thread of this identity is within the call of a module, whichever it is."""
    return any(True for _ in _calls(sys._current_frames().get(thread)))


def called_within(module: int, *, entering: bool) -> bool:
    """True if this thread is within the call of the module of this ``id``. ``entering``: hooks of
    the innermost call ask, which is not counted."""
    calls = _calls(sys._getframe())
    if entering:
        next(calls, None)
    return any(id(frame.f_locals.get("self")) == module for frame in calls)


def thread_name(thread: int) -> str:
    """ "thread 'worker-1'"."""
    names = [some.name for some in threading.enumerate() if some.ident == thread]
    return f"thread {names[0]!r}" if names else "a thread that has ended"


def _calls(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of calls of modules, innermost first."""
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame
        frame = frame.f_back
