"""Messages that people type into a terminal: editing, history, and pasted texts in one piece."""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from layer_streamer import cache_path

MOST_KEPT = 1000
"""Messages in the history."""


class Terminal:
    """Reads messages from a terminal, which stdin and stdout must both be.

    What was typed before, in earlier chats as well, is at the arrow keys. It is kept in a file that
    only its owner can read; where that cannot be written, for as long as the process runs.
    """

    def __init__(self, mark: str = "> ", history: Path | None = None) -> None:
        """``mark`` is written before what is typed. ``history``: the file, by default in the
        user's cache directory."""
        self._mark = mark
        self._history = cache_path("chat_history.jsonl") if history is None else history
        self._readline = _open_readline()
        if self._readline is not None:
            for text in self._remembered():
                self._readline.add_history(text)

    def __call__(self) -> str:
        """The next message, a pasted text of several lines as one. Raises EOFError at the end of
        the input, KeyboardInterrupt for Ctrl-C."""
        text = input(self._mark)
        if self._readline is None or not _brackets_pastes(self._readline):
            while _line_is_waiting():  # nobody types so fast
                text += "\n" + input()
        if text.strip():
            self._remember(text)
        return text

    def _remember(self, text: str) -> None:
        if self._readline is None:
            return
        self._readline.add_history(text)
        with suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            # Read again: another chat may have written it meanwhile.
            kept = [*self._remembered(), text][-MOST_KEPT:]
            handle, name = tempfile.mkstemp(dir=self._history.parent)
            with open(handle, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(item) + "\n" for item in kept)
            Path(name).replace(self._history)

    def _remembered(self) -> list[str]:
        """The messages in the file; of what is not a message there, none."""
        found = []
        try:
            lines = self._history.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        for line in lines:
            with suppress(ValueError):
                found.append(json.loads(line))
        return [text for text in found if isinstance(text, str)]


def open_reader(mark: str = "> ") -> Callable[[], str]:
    """What reads messages from stdin: line by line, unless people type them into a terminal."""
    return Terminal(mark) if sys.stdin.isatty() and sys.stdout.isatty() else input


def _open_readline() -> Any:
    """The module, set up; None for a Python without it."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)
    if _brackets_pastes(readline):
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def _brackets_pastes(readline: Any) -> bool:
    """True if a pasted text comes in one piece: libedit gives it line by line."""
    return "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM") != "dumb"


def _line_is_waiting() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])
