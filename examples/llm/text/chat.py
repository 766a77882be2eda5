"""A chat in a terminal: turns are read, answers are written as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..engine import StreamingEngine

NEW = "/new"
HELP = f"an empty line or {NEW} starts over, Ctrl-C ends an answer, Ctrl-D ends the chat"


class Chat:
    """The turns of one conversation.

    What two turns have in common, which is all of the conversation but the new question and the
    marks around it, keeps its keys and values: only the rest is prefilled.
    """

    def __init__(
        self, engine: StreamingEngine, write: Callable[[str], None], options: Mapping[str, Any]
    ) -> None:
        """``write`` gets the text of the answers; ``options`` are ``engine.generate``'s."""
        self._engine, self._write, self._options = engine, write, dict(options)
        self.messages: list[dict[str, str]] = []

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
        whole = True
        try:
            for piece in self._engine.generate(
                [*self.messages, question], stream=True, reuse_prefix=True, **self._options
            ):
                said.append(piece)
                self._write(piece)
        except KeyboardInterrupt:
            whole = False
        self.messages += [question, {"role": "assistant", "content": "".join(said)}]
        self._write("\n")
        return whole


def run_chat(chat: Chat, lines: Iterator[str | None], say: Callable[[str], None]) -> None:
    """Answer line after line; None is a Ctrl-C where nothing was being answered."""
    say(HELP)
    for line in lines:
        if line is None:
            say("(Ctrl-D ends the chat)")
        elif line.strip() in ("", NEW):
            chat.start_over()
            say("(starting over)")
        else:
            try:
                whole = chat.answer(line)
            except KeyboardInterrupt:  # a second one, while the first was being dealt with
                whole = False
            except ValueError as error:
                say(f"error: {error} ({NEW} starts over)")
                continue
            if not whole:
                say("(ended)")


def read_lines(ask: Callable[[], str]) -> Iterator[str | None]:
    """Lines until the end of the input; None for each Ctrl-C."""
    while True:
        try:
            yield ask()
        except EOFError:
            return
        except KeyboardInterrupt:
            yield None
