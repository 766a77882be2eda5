"""The turns of one conversation, whoever answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from ..reading.choice_text import Delta

Turn: TypeAlias = dict[str, str]
"""A message: "role" and "content"."""
Put: TypeAlias = Callable[[str], None]
"""Takes a piece of an answer's text as soon as it is known."""


class Conversation(ABC):
    """Questions and answers so far; :meth:`speak` is what answers.

    What a model thinks before it answers is no part of it: chat templates leave it out, or refuse
    it.
    """

    def __init__(self, write: Put, think: Put = lambda text: None) -> None:
        """``write`` gets the text of the answers, ``think`` what the model thinks before."""
        self._write, self._think = write, think
        self.messages: list[Turn] = []
        self.note = ""
        """Why the last answer ended, if it is not that all was said."""

    @abstractmethod
    def speak(self, messages: list[Turn], put: Put) -> str:
        """Answer the last of the messages; returns why it ended early, "" if all was said.

        ValueError if the conversation does not fit. A KeyboardInterrupt may end it anywhere.
        """

    def tell(self, delta: Delta, put: Put) -> None:
        """Pass on what more there is of a text."""
        if delta.reasoning:
            self._think(delta.reasoning)
        if delta.answer:
            put(delta.answer)

    def start_over(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def answer(self, text: str) -> bool:
        """Answer one question, with a newline at the end; False if Ctrl-C ended the answer. What
        came of it is kept.

        ValueError if the conversation does not fit any more: the question is then forgotten.
        """
        question = {"role": "user", "content": text}
        said: list[str] = []

        def put(piece: str) -> None:
            said.append(piece)
            self._write(piece)

        whole, self.note = True, ""
        try:
            self.note = self.speak([*self.messages, question], put)
        except KeyboardInterrupt:
            whole, self.note = False, "(ended)"
        self.messages += [question, {"role": "assistant", "content": "".join(said)}]
        self._write("\n")
        return whole


def ended_at(count: int, most: int, length: int) -> str:
    """The note of an answer of ``count`` tokens that had no room for more: ``most`` were asked for
    at most, and a conversation has ``length``."""
    if count == most:
        return (
            f"(ended at {count:,} tokens: ask it to go on, or start the chat with a larger "
            "--max-new-tokens)"
        )
    return f"(ended: the conversation fills its {length:,} tokens, /new starts over)"
