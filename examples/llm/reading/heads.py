"""What stands before each message of gpt-oss: ``<|start|>assistant to=NAME<|channel|>NAME
<|constrain|>KIND<|message|>``, of which all may be absent but the last mark."""

from __future__ import annotations

import re

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END = "<|end|>"
CALL = "<|call|>"
TURN_ENDS = ("<|return|>", CALL)
"""Behind these it is for others to speak."""
ENDS = (END, *TURN_ENDS, "<|endoftext|>")
"""Of a message."""
MARKS = (START, CHANNEL, *ENDS)
"""What a message may be followed by."""
OWN = f"{START}assistant"
"""Chat templates end so: it is for the model to speak."""


def _begun(word: str) -> str:
    """Matches all beginnings of a word."""
    found = ""
    for character in reversed(word):
        found = f"(?:{re.escape(character)}{found})?"
    return found


_MARKS = {mark: re.escape(mark) for mark in (START, CHANNEL, CONSTRAIN, MESSAGE)}
_TO = r" {0,4}to=[^\s<]{1,200}"
_TO_BEGUN = r" {0,4}(?:t(?:o(?:=[^\s<]{0,200})?)?)?"
_NAME = _MARKS[CHANNEL] + r"\w{1,64}"
_KIND = rf"(?: {{0,4}}{_MARKS[CONSTRAIN]} {{0,4}}[\w.+/-]{{0,64}}| {{1,4}}[\w.+/-]{{1,64}})"
_KIND_BEGUN = rf" {{0,4}}(?:{_KIND}|{_begun(CONSTRAIN)})"
_PARTS = [
    (f"{_MARKS[START]}(?:assistant)?", _begun(OWN)),
    (_TO, _TO_BEGUN),
    (rf" {{0,4}}{_NAME}", rf" {{0,4}}(?:{_NAME}|{_begun(CHANNEL)})"),
    (_TO, _TO_BEGUN),
    (_KIND, _KIND_BEGUN),
    (rf" {{0,4}}{_MARKS[MESSAGE]}", rf" {{0,4}}{_begun(MESSAGE)}"),
]
"""In their order: each as a whole, and as far as it may have come."""
HEAD = re.compile("".join(f"(?:{whole})?" for whole, _ in _PARTS[:-1]) + _PARTS[-1][0])
_SO_FAR = re.compile(
    "|".join(
        "".join(f"(?:{whole})?" for whole, _ in _PARTS[:count]) + begun
        for count, (_, begun) in enumerate(_PARTS)
    )
)
_CHANNEL, _RECIPIENT = re.compile(_MARKS[CHANNEL] + r"(\w+)"), re.compile(r"to=([^\s<]+)")


def may_be_head(text: str) -> bool:
    """True: with more behind it, it may be one."""
    return _SO_FAR.fullmatch(text) is not None


def read_head(head: str) -> tuple[str, str]:
    """The channel and who it is for, each "" where it is not said."""
    channel, to = _CHANNEL.search(head), _RECIPIENT.findall(head)
    return channel[1] if channel else "", to[-1] if to else ""


def lead_of(text: str) -> str:
    """The head in which a prompt ends, or the beginning of one; ``text``: of the prompt, from its
    last ``START`` on. "" if it ends in none: a message may have begun behind it, but none ended."""
    head = HEAD.match(text)
    if head is None:
        return text if may_be_head(text) else ""
    return "" if any(end in text[head.end() :] for end in ENDS) else head.group()


class HeadText:
    """Gives of a text that comes in pieces what stands in heads: at once, be it that it turns out
    to be none."""

    def __init__(self, lead: str) -> None:
        self._inside, self._tail = MESSAGE not in lead, ""

    def push(self, text: str) -> str:
        """What one more piece brings."""
        found = ""
        for character in text:
            self._tail = (self._tail + character)[-len(CONSTRAIN) :]
            if self._inside:
                found += character
                self._inside = not self._tail.endswith(MESSAGE)
            else:
                self._inside = self._tail.endswith((START, CHANNEL))
        return found
