"""llguidance, which compiles constraints and follows them: imported where it is needed, held to
limits, its messages in one line."""

from __future__ import annotations

import re
from typing import Any

from ..errors import optional_packages

MOST_STATES = 50_000
"""Of a row's lexer, of 1 to 2 KiB each."""
LONGEST = 240
"""Characters of a message."""
LARK_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
MARKED = re.compile(r"^ {4}([^\n]*)\n {4}( *)\^[^\n]*\n(?:error: )?([^\n]*)", re.MULTILINE)


def llguidance() -> Any:
    """The package; ImportError with the extra that brings it."""
    with optional_packages("serve"):
        import llguidance

        return llguidance


def limits() -> Any:
    """Of compiling a constraint and of one step in it: its own, but for what rows may keep."""
    return llguidance().LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)


def told(message: str, *, lark: str | None = None, is_gbnf: bool = False) -> str:
    """A message in one line, with where it is. ``lark``: the grammar that it speaks of; what was
    made of GBNF has other lines than that, so that the rule is named."""
    place = LARK_PLACE.match(message)
    message = message[place.end() :] if place else message
    marked = MARKED.search(message)
    if marked is not None:
        pattern, before, reason = marked.groups()
        message = f"{_cut(pattern)!r}, character {len(before) + 1}: {reason}"
    else:
        message = message.partition("\n   1 | ")[0].partition("; following special tokens")[0]
    message = _cut(" ".join(message.removesuffix("<non-verbose/>").split()))
    if place is None or lark is None:
        return message
    line, column = int(place[1]), int(place[2])
    if not is_gbnf:
        return f"line {line}, column {column}: {message}"
    names = re.findall(r"^(\w+):", "\n".join(lark.split("\n")[:line]), re.MULTILINE)
    return f"rule {'root' if names[-1:] in ([], ['start']) else names[-1]}: {message}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
