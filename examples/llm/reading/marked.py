"""Calls that a mark announces: what the parsers of such families share."""

from __future__ import annotations

from .found import Call, Found, overlap

LONGEST = 1_000_000
"""Characters that may be held back as the beginning of a call."""


class Marked:
    """Text up to a mark, then a call, then text.

    A subclass reads the call: :meth:`read` is asked whenever there is more text.
    """

    marks: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    """What is no text, wherever it stands outside of a call: such as the token that ends it."""

    def __init__(self) -> None:
        self._text = ""
        self._inside = False
        self._space = ""
        """What stood before the mark: text, if what it announces is no call."""
        self._has_called = False
        self._fresh = True
        """Nothing has been told yet, or nothing since the last call."""

    def read(self, text: str, *, ended: bool) -> tuple[list[Call], int] | int | None:
        """The calls of a text that begins with a mark, and how long what they are written in is;
        a number: so many characters are no call after all; None: it is not all there yet.

        ``ended``: nothing follows.
        """
        raise NotImplementedError

    def restart(self) -> None:
        """Forget what was learnt of a text that :meth:`read` has seen the beginning of."""

    def unmarked(self, text: str, *, ended: bool) -> int | None:
        """For calls without a mark, at the beginning or after another: how much stands before one,
        -1 if there is none; None: it cannot be said yet."""
        return -1

    def push(self, text: str) -> list[Found]:
        """What one more piece brings."""
        self._text += text
        return self._take(ended=False)

    def finish(self) -> list[Found]:
        """What was held back."""
        return self._take(ended=True)

    def _take(self, *, ended: bool) -> list[Found]:
        found: list[Found] = []
        while self._text and (self._inside or self._reach(found, ended=ended)):
            told = self.read(self._text, ended=ended or len(self._text) > LONGEST)
            if told is None:
                break
            self._inside = False
            self.restart()
            if isinstance(told, int):
                self._text, told = self._space + self._text, told + len(self._space)
                self._tell(found, told)
            else:
                found += told[0]
                self._text, self._has_called, self._fresh = self._text[told[1] :], True, True
            self._space = ""
        return found

    def _reach(self, found: list[Found], *, ended: bool) -> bool:
        """Tell the text before the next call; True: there may be one, and the text begins with
        it."""
        if self._fresh:
            skipped = self.unmarked(self._text, ended=ended)
            if skipped is None:
                return False
            self._inside = skipped >= 0
            if self._inside:
                self._space, self._text = self._text[:skipped], self._text[skipped:]
                return True
        marks = (*self.marks, *self.hidden)
        at, mark = min(((self._text.find(mark), mark) for mark in marks if mark in self._text),
                       default=(len(self._text), ""))  # fmt: skip
        if ended and not mark:
            self._tell(found, at)
            return False
        keep = 0 if mark else overlap(self._text, marks)
        self._tell(found, len(self._text[: at - keep].rstrip()))
        if not mark:
            return False
        at = self._text.find(mark)
        self._space, self._text = self._text[:at], self._text[at:]
        if mark in self.hidden:
            self._text, self._space = self._space + self._text[len(mark) :], ""
            return self._reach(found, ended=ended)
        self._inside = True
        return True

    def _tell(self, found: list[Found], length: int) -> None:
        """So many characters are text; white space that follows a call is none."""
        text, self._text = self._text[:length], self._text[length:]
        if self._has_called:
            text = text.lstrip()
        if text:
            self._has_called = self._fresh = False
            found.append(text)


def skip_space(text: str, at: int) -> int:
    """The place of the next character that is not white."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def closed(text: str, at: int, mark: str, *, ended: bool) -> int | None:
    """The place behind a closing mark that may stand there after white space, or ``at``; None: it
    cannot be said yet."""
    begin = skip_space(text, at)
    if text.startswith(mark, begin):
        return begin + len(mark)
    if not ended and mark.startswith(text[begin:]):
        return None
    return at
