"""gpt-oss: messages in channels, ``<|channel|>NAME<|message|>...<|end|>``.

What the model thinks is in the channel "analysis", a call is a message to ``functions.NAME``, and
all else is the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from .found import Call, Found, JsonEnd, Thought, overlap, read_json
from .heads import CHANNEL, ENDS, HEAD, MARKS, MESSAGE, OWN, START, may_be_head, read_head
from .marked import LONGEST, skip_space

FUNCTIONS = "functions."
FINAL = f"{CHANNEL}final{MESSAGE}"
"""Behind it is the answer."""
LONGEST_MARK = max(map(len, MARKS))
_MARK = re.compile("|".join(map(re.escape, (START, CHANNEL))))
BETWEEN = "\n\n"
"""Messages that one field is made of are paragraphs of it."""


class Harmony:
    """Takes a whole text apart: reasoning, calls, and the answer.

    Marks are special tokens, but come as text. So one is a mark where the format has one, and text
    where it does not; a call's JSON may have any of them. A message to anybody but the tools that
    are there goes with its head to where its channel goes.
    """

    def __init__(self, names: Collection[str], lead: str = "") -> None:
        """``names``: of the tools that may be called, if any. ``lead``: the head of a message in
        which the prompt ends, or the beginning of one."""
        self._names = names
        self._text = lead or OWN
        self._unseen = len(self._text)
        """Characters that stand before the text."""
        self._state = "head"
        self._thinks = False
        """What is told is reasoning."""
        self._told: set[bool] = set()
        """Of either, if something has been."""
        self._parts = True
        """What is told next is the first behind the end of a message."""
        self._name, self._channel, self._start = "", "", 0
        """Of a call: whose it is, where it stands, and where its object begins."""
        self._json: JsonEnd | None = None
        self._take(ended=False)

    def push(self, text: str) -> list[Found]:
        """What one more piece brings."""
        self._text += text
        return self._take(ended=False)

    def finish(self) -> list[Found]:
        """What was held back."""
        return self._take(ended=True)

    def _take(self, *, ended: bool) -> list[Found]:
        steps = {"head": self._head, "body": self._body, "call": self._call, "behind": self._behind}
        found: list[Found] = []
        while self._text and steps[self._state](found, ended=ended):
            pass
        return found

    def _head(self, found: list[Found], *, ended: bool) -> bool:
        """At what may be the head of a message."""
        head = HEAD.match(self._text)
        if head is None:
            begun = may_be_head(self._text)
            if begun and not ended:
                return False
            if begun and self._parts and _MARK.search(self._text, self._unseen):
                self._text = ""  # the text was cut here, and this is none of it
                return False
            self._no_mark(found)
            return True
        channel, to = read_head(head.group())
        name = to.removeprefix(FUNCTIONS)
        if name and self._names and (to.startswith(FUNCTIONS) or name in self._names):
            self._name, self._channel, self._start = name, channel, head.end()
            self._state = "call"
            self._json = None
            return True
        self._pass_on(found, head.end(), channel, shown=bool(to))
        return True

    def _pass_on(self, found: list[Found], length: int, channel: str, *, shown: bool) -> None:
        """A message, of which so many characters are the head, goes to where its channel goes."""
        self._thinks, self._parts, self._state = channel == "analysis", True, "body"
        unseen, self._unseen = self._unseen, 0
        self._tell(found, length, hidden=unseen if shown else length)

    def _no_mark(self, found: list[Found]) -> None:
        """What seemed to be a head is text: its mark is, and then one looks anew."""
        self._state = "body"
        if self._unseen:
            self._text, self._unseen = self._text[self._unseen :], 0
        else:
            self._tell(found, len(START if self._text.startswith(START) else CHANNEL))

    def _body(self, found: list[Found], *, ended: bool) -> bool:
        """In a message that is passed on."""
        places = {self._text.find(mark): mark for mark in MARKS if mark in self._text}
        if not places:
            keep = 0 if ended else overlap(self._text, MARKS)
            self._tell(found, len(self._text) - keep)
            return False
        at = min(places)
        self._tell(found, at)
        if places[at] in (START, CHANNEL):
            self._state = "head"
            return True
        return self._end(found, places[at], ended=ended)

    def _end(self, found: list[Found], mark: str, *, ended: bool) -> bool:
        """At a mark that ends a message, if another mark follows, or nothing."""
        rest = self._text[skip_space(self._text, len(mark)) :]
        if rest.startswith(MARKS) or (ended and not rest):
            self._text, self._thinks, self._parts = rest, False, True
            return True
        if not ended and any(other.startswith(rest) for other in MARKS):
            return False
        self._tell(found, len(mark))
        return True

    def _call(self, found: list[Found], *, ended: bool) -> bool:
        """In a message to a tool: an object, or nothing at all."""
        text, value, end = self._text, None, None
        ended = ended or len(text) > LONGEST
        at = skip_space(text, self._start)
        if text.startswith("{", at):
            self._json = self._json or JsonEnd(at)
            end = self._json.find(text)
            if end is None and not ended:
                return False
            value = read_json(text[at:end])
        elif text.startswith(ENDS, at):
            value, end = {}, at
        elif not ended and any(mark.startswith(text[at : at + LONGEST_MARK]) for mark in ENDS):
            return False
        if end is None or not isinstance(value, Mapping):
            self._pass_on(found, self._start, self._channel, shown=True)
            return True
        found.append(Call(self._name, json.dumps(value, ensure_ascii=False)))
        self._text, self._unseen, self._state = text[end:], 0, "behind"
        return True

    def _behind(self, found: list[Found], *, ended: bool) -> bool:
        """Behind a call, where white space is none."""
        self._text = rest = self._text.lstrip()
        mark = next((mark for mark in ENDS if rest.startswith(mark)), None)
        if mark is not None:
            self._text = rest[len(mark) :]
            return True
        if not ended and any(mark.startswith(rest) for mark in MARKS):
            return False
        self._state, self._thinks, self._parts = "body", False, True
        return True

    def _tell(self, found: list[Found], length: int, *, hidden: int = 0) -> None:
        """So many characters go to where the message goes, but for those at the beginning that are
        hidden."""
        text, self._text = self._text[hidden:length], self._text[length:]
        if not text:
            return
        if self._parts and self._thinks in self._told:
            text = BETWEEN + text
        self._parts = False
        self._told.add(self._thinks)
        found.append(Thought(text) if self._thinks else text)
