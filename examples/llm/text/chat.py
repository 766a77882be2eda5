"""A chat in a terminal: turns are read, answers are written as they come."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, PromptTooLongError
from ..reading.reader import Reader
from .conversation import Conversation, Put, Turn, ended_at

if TYPE_CHECKING:
    from ..engine import StreamingEngine

DEFAULT_TOKENS = 1024
"""Of an answer at most, if nobody says how many and the context has room for them."""
COMMANDS = {
    "/new": "starts over: the conversation so far is forgotten",
    "/help": "says this",
    "/exit": "ends the chat, as Ctrl-D does",
}
COMMAND = re.compile(r"/[a-zA-Z?]*([ \t].*)?")
"""A single line that looks like a command; a path does not."""
HELP = "\n".join(
    [
        *(f"{name} {meaning}" for name, meaning in COMMANDS.items()),
        "Ctrl-C ends an answer; where nothing is being answered, two of them end the chat",
    ]
)


class Chat(Conversation):
    """A conversation with the engine.

    What two turns have in common, which is all of the conversation but the new question and the
    marks around it, keeps its keys and values: only the rest is prefilled.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        write: Put,
        options: Mapping[str, Any],
        think: Put = lambda text: None,
    ) -> None:
        """``write`` gets the text of the answers, ``think`` what the model thinks before;
        ``options`` are ``engine.generate``'s."""
        super().__init__(write, think)
        asked = dict(options)
        self._template_options = asked.pop("chat_template_kwargs", None)
        self._most = asked.pop("max_new_tokens", None) or DEFAULT_TOKENS
        self._engine, self._reader = engine, Reader(engine.tokenizer, asked)

    def speak(self, messages: list[Turn], put: Put) -> str:
        """The engine's answer to a conversation."""
        engine, note = self._engine, ""
        ids = engine.encode(messages, self._template_options)
        count = min(self._most, engine.max_length - len(ids))
        text = self._reader.text(ids)
        for request, piece in engine.events(
            [ids], max_new_tokens=count, reuse_prefix=True, **self._reader.options
        ):
            self.tell(text.push(piece), put)
            if request.finish_reason == "length":
                note = ended_at(count, self._most, engine.max_length)
        self.tell(text.finish(), put)
        return note


def run_chat(
    chat: Conversation, messages: Iterator[str | None], say: Callable[[str], None]
) -> None:
    """Answer message after message; None is a Ctrl-C where nothing was being answered, of which
    two in a row end the chat."""
    say("/help lists the commands")
    interrupted = False
    for text in messages:
        if text is None:
            if interrupted:
                return
            say("(once more, or Ctrl-D, ends the chat)")
        elif COMMAND.fullmatch(text):
            if text.strip() == "/exit":
                return
            say(_command(chat, text.strip()))
        elif text.strip():
            _answer(chat, text, say)
        interrupted = text is None


def _command(chat: Conversation, name: str) -> str:
    """Do what a command says; what to tell of it."""
    if name == "/new":
        chat.start_over()
        return "(starting over)"
    if name == "/help":
        return HELP
    return f"{name} is no command (there are {', '.join(COMMANDS)}); a space before it sends it"


def _answer(chat: Conversation, text: str, say: Callable[[str], None]) -> None:
    try:
        chat.answer(text)
    except KeyboardInterrupt:  # a second one, while the first was being dealt with
        chat.note = "(ended)"
    except PromptTooLongError as error:
        say(f"error: the conversation does not fit any more: {error} (/new starts over)")
        return
    except (ValueError, EngineError) as error:
        say(f"error: {error}")
        return
    if chat.note:
        say(chat.note)


def read_lines(ask: Callable[[], str]) -> Iterator[str | None]:
    """Lines until the end of the input; None for each Ctrl-C."""
    while True:
        try:
            yield ask()
        except EOFError:
            return
        except KeyboardInterrupt:
            yield None
