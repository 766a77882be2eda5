"""Interrupts at exact places: the n-th line or bytecode of the library that a thread comes to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import layer_streamer

LIBRARY = str(Path(layer_streamer.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """Tells our interrupts from a user's."""


class Interrupter:
    """Raises Interrupt at the n-th event of this thread within the library, once.

    ``skipped``: wings of the library that are not counted, such as those that own nothing.
    """

    def __init__(self, number: int, kind: str, skipped: Sequence[str] = ()) -> None:
        self._left = number
        self._skipped = tuple(f"{LIBRARY}/{wing}/" for wing in skipped)
        self._kind = kind
        self.fired = False

    @property
    def left(self) -> int:
        """Events until the interrupt."""
        return self._left

    def __enter__(self) -> Interrupter:
        # Python 3.12.0 and 3.12.1 ask for bytecodes of what is called later only if a frame wants
        # them by now.
        sys._getframe().f_trace_opcodes = self._kind == "opcode"
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(LIBRARY) or name.startswith(self._skipped):
            return None
        frame.f_trace_opcodes = self._kind == "opcode"
        return self._event

    def _event(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == self._kind and not self.fired:
            self._left -= 1
            if self._left < 0:
                self.fired = True
                raise Interrupt
        return self._event
