"""The rows of a file to learn from: JSON lines, each a chat, a text, or a prompt and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..text.prompt_file import read_line

KINDS = (("messages",), ("prompt", "completion"), ("text",))
"""What a row has, one of these."""


class Row(NamedTuple):
    """One line, whose shape is known to be right."""

    line: int
    """Its number, from 1."""
    content: Mapping[str, Any]

    @property
    def messages(self) -> list[Mapping[str, Any]] | None:
        """Of a chat; None: it is none."""
        return self.content.get("messages")


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; blank lines are none.

    ValueError, naming file and line, for one that is no JSON or has not what it must have, and for
    a file without any. OSError if it cannot be read.
    """
    rows = list(_read(path))
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return rows


def _read(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield Row(number, _checked(read_line(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _checked(found: Any) -> Mapping[str, Any]:
    """A row as it is; ValueError if it cannot be learned from."""
    if not isinstance(found, Mapping):
        raise ValueError('must be an object with "messages", "prompt" and "completion", or "text"')
    kinds = [kind for kind in KINDS if any(key in found for key in kind)]
    if len(kinds) != 1:
        raise ValueError('must have one of "messages", "prompt" with "completion", and "text"')
    if kinds[0] == ("messages",):
        _check_messages(found["messages"])
        return found
    for key in kinds[0]:
        if not isinstance(found.get(key), str):
            raise ValueError(f'"{key}" must be a string')
    if not found[kinds[0][-1]]:
        raise ValueError(f'"{kinds[0][-1]}" is empty')
    return found


def _check_messages(found: Any) -> None:
    if not isinstance(found, list) or not found:
        raise ValueError('"messages" must be a list of objects')
    for at, message in enumerate(found, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {at} must be an object with a "role"')
        if message["role"] == "assistant":
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise ValueError(f'message {at} must have "content", a string')
        elif not isinstance(message.get("content"), str | list):
            raise ValueError(f'message {at} must have "content"')
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError("has no message of the assistant, so there is nothing to learn")
