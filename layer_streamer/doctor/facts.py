"""What a report is made of: facts, each known or with the reason why not; lines for a screen. Pure.

A line that asks the reader to do something is marked with "!" and says what.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import printable

COLUMNS = 100
"""Of the screen."""
LABEL = 15
"""Columns of a line's name."""
MOST_ROWS = 3
"""Of one line's text, and of its advice; what is longer is cut."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """Something that was looked up: a value, or the reason why there is none."""

    value: T | None
    reason: str = ""
    """Why ``value`` is None."""

    def text(self, form: Callable[[T], str] = str) -> str:
        """The value for people, or why it is not known."""
        return form(self.value) if self.value is not None else f"unknown ({self.reason})"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a group."""

    label: str
    """Empty: the text begins where labels do."""
    text: str
    advice: str = ""
    """What to do about it; a line that has some is a warning."""


@dataclass(frozen=True, slots=True)
class Group:
    """Lines under a heading."""

    title: str
    lines: tuple[Line, ...]


def learn(look: Callable[[], T | None], otherwise: str = "the system does not say") -> Fact[T]:
    """What ``look()`` returns; None is explained by ``otherwise``, an exception by itself."""
    try:
        value = look()
    except Exception as error:  # whatever it is: a report of what goes wrong has to go on
        return Fact(None, one_line(error))
    return Fact(value) if value is not None else Fact(None, otherwise)


def one_line(error: object) -> str:
    """The first line of a message; the kind of an error that has none, and of those of Python."""
    said = str(error).strip().splitlines()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not said:
        return type(error).__name__
    if isinstance(error, LookupError | TypeError | AttributeError | RecursionError | MemoryError):
        return f"{type(error).__name__}: {said[0]}"
    return said[0]


@contextmanager
def notices() -> Iterator[list[str]]:
    """Context in which the library's warnings are collected instead of logged."""
    collected: list[str] = []

    class _Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in collected:
                collected.append(record.getMessage())

    logger, handler = logging.getLogger(__package__.partition(".")[0]), _Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield collected
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def render(groups: Sequence[Group]) -> str:
    """The groups as text, no line of it wider than COLUMNS."""
    rows = list[str]()
    for group in groups:
        if group.lines:
            rows.append(printable(group.title))
            for line in group.lines:
                rows += _rows(line)
    return "\n".join(rows)


def _rows(line: Line) -> list[str]:
    mark, width = "!" if line.advice else " ", LABEL if line.label else 0
    rows = _wrap(f"{mark} {printable(line.label):<{width}}", line.text)
    if line.advice:
        rows += _wrap(" " * (width + 2) + "-> ", line.advice)
    return rows


def _wrap(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        printable(text) or "-",
        COLUMNS,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        max_lines=MOST_ROWS,
        placeholder=" ...",
    )
