"""A pull parser for JSON objects with very many small members, as safetensors headers are.

``json.loads`` holds bytes, text and all objects at once, some ten times the text for hostile
input. Here the text passes through a window, each member is handed out as it is parsed, and the
caller stops at the first one it rejects.
"""

from __future__ import annotations

import json
import re
from encodings.utf_8_sig import IncrementalDecoder
from typing import Any, NoReturn

from ..errors import CheckpointError
from .header import WINDOW_BYTES, HeaderFile
from .names import MAX_NAME_CHARS

_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r'[ \t\n\r]*,[ \t\n\r]*(?=")')
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*(?=[^ \t\n\r])")


class JsonMembers:
    """Walks the members of nested objects in ``length`` bytes of JSON at ``start`` of a file,
    which a byte order mark may begin.

    ``enter()`` opens an object, then ``next_key()`` gives its keys until None; after each key
    exactly one of ``value()``, ``string()`` and ``enter()`` follows. ``finish()`` checks the end.
    Every fault is a CheckpointError. Memory: a window, and the largest single value.
    """

    def __init__(self, file: HeaderFile, start: int, length: int, what: str) -> None:
        self._file = file
        self._what = what
        self._next = start
        self._end = start + length
        # Not looked up by name: that imports it here, where a process that has given up its rights
        # may not be allowed to.
        self._decode = IncrementalDecoder().decode
        self._text = ""
        self._pos = 0
        self._dropped = 0
        self._fresh = False
        self._parse = json.JSONDecoder(
            object_pairs_hook=_unique_pairs, parse_constant=_reject_constant
        ).raw_decode

    def enter(self) -> None:
        """Open the object that begins here."""
        if self._peek() != "{":
            self.fail("expected an object")
        self._pos += 1
        self._fresh = True

    def enter_or_null(self) -> bool:
        """Open the object that begins here; False, and it is passed, if there is a null."""
        if self._peek() != "n":
            self.enter()
            return True
        self._scan(len("null"))
        return False

    def next_key(self) -> str | None:
        """The next key of the object opened last; None, and the object is left, at its end."""
        match = _COMMA.match(self._text, self._pos)
        if match and not self._fresh:  # nearly always; the rest is for the window's end and faults
            self._pos = match.end()
            return self._key()
        char = self._peek()
        if char == "}":
            self._pos += 1
            self._fresh = False
            return None
        if not self._fresh:
            if char != ",":
                self.fail("expected ',' or '}'")
            self._pos += 1
            char = self._peek()
        self._fresh = False
        if char != '"':
            self.fail("expected a key in quotes")
        return self._key()

    def value(self, max_chars: int = WINDOW_BYTES) -> Any:
        """The value that begins here, parsed whole; its text may have ``max_chars`` characters."""
        return self._scan(max_chars)

    def string(self, max_chars: int = WINDOW_BYTES) -> str:
        """The value that begins here, which must be a string."""
        if self._peek() != '"':
            self.fail("expected a string")
        text: str = self._scan(max_chars)
        return text

    def finish(self) -> None:
        """Only white space may be left."""
        if self._peek(at_end=True):
            self.fail("unexpected data after the closing '}'")

    def fail(self, problem: str) -> NoReturn:
        """CheckpointError that names file, place and ``problem``."""
        place = self._dropped + self._pos
        raise CheckpointError(f"{self._file.path}: {self._what}: {problem} (character {place})")

    def _key(self) -> str:
        key: str = self._scan(6 * MAX_NAME_CHARS + 2)  # a character is at most \uXXXX
        match = _COLON.match(self._text, self._pos)
        if match:
            self._pos = match.end()
            return key
        if self._peek() != ":":
            self.fail("expected ':'")
        self._pos += 1
        self._peek()
        return key

    def _peek(self, *, at_end: bool = False) -> str:
        """The next character that is no white space, not consumed; '' at the end if allowed."""
        while True:
            match = _SPACE.match(self._text, self._pos)
            self._pos = match.end() if match else self._pos
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._refill():
                break
        if not at_end:
            self.fail("ends too early, not complete JSON")
        return ""

    def _scan(self, max_chars: int) -> Any:
        while True:
            try:
                value, end = self._parse(self._text, self._pos)
            except (ValueError, RecursionError) as error:
                # A value may go on behind the window: only with all of its text is it wrong.
                if len(self._text) - self._pos < max_chars and self._refill():
                    continue
                limit = f", or longer than {max_chars} characters" if self._next < self._end else ""
                self.fail(f"not valid JSON: {_reason(error)}{limit}")
            if end - self._pos > max_chars:
                self.fail(f"a value of {end - self._pos} characters, more than {max_chars}")
            if end < len(self._text) or not self._refill():  # "12" may be the half of "1234"
                self._pos = end
                return value

    def _refill(self) -> bool:
        """Drop what is consumed and append more text; False at the end.

        As much again as is held, so that a value parsed anew after each refill costs twice its
        length at most.
        """
        count = min(max(WINDOW_BYTES, len(self._text) - self._pos), self._end - self._next)
        if count == 0:
            return False
        raw = self._file.read(self._next, count)
        self._next += count
        try:
            more = self._decode(raw, self._next == self._end)
        except UnicodeDecodeError as error:
            self.fail(f"not valid UTF-8: {error.reason}")
        self._dropped += self._pos
        self._text = self._text[self._pos :] + more
        self._pos = 0
        return True


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return members


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
