"""What a model says and what it thinks, on their way to people. Imports nothing large."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from .command import shown

if TYPE_CHECKING:
    from ..llm.reading.choice_text import Delta

DIM, PLAIN = "\x1b[2m", "\x1b[22m"


class Voice:
    """Answers go to stdout as they come, and reasoning to stderr: dimmed, if that is a terminal.

    Thread rules: one thread.
    """

    def __init__(self, *, thinks: bool = True) -> None:
        """Not ``thinks``: reasoning goes nowhere."""
        self._thinks, self._thinking = thinks, False
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._dims = is_terminal and os.environ.get("TERM") != "dumb"

    def tell(self, delta: Delta) -> None:
        """What more there is of a text."""
        if delta.reasoning:
            self.think(delta.reasoning)
        if delta.answer:
            self.say(delta.answer)

    def say(self, text: str) -> None:
        """More of the answer."""
        self.end()
        write(text)

    def think(self, text: str) -> None:
        """More of what leads to it."""
        if not self._thinks:
            return
        self._thinking = True
        text = shown(text)
        # Each piece by itself: no Ctrl-C leaves the terminal dim.
        _murmur(f"{DIM}{text}{PLAIN}" if self._dims else text)

    def end(self) -> None:
        """What follows reasoning begins on a line of its own."""
        if self._thinking:
            self._thinking = False
            _murmur("\n")


def write(text: str) -> None:
    """Text to stdout at once, as UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def _murmur(text: str) -> None:
    if sys.stderr is not None:  # as where it was closed
        with suppress(OSError, ValueError):  # nobody reads it: no reason to end
            print(text, end="", file=sys.stderr, flush=True)
