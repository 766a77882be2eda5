"""A file of prompts to a file of results: JSON lines, in order, and resumable.

A line of prompts is a JSON string (a text to be continued, or a question if the model chats), or an
object with "prompt" or "messages". A line of results names the line it answers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from ..engine import StreamingEngine
from ..errors import without_frames
from ..reading.choice_text import ChoiceText, Delta
from ..reading.reader import Reader
from .completion import Completion
from .prompts import Prompt
from .requests import Encoded


class PromptFile:
    """Reads prompts line by line; a bad one is reported in its place, and the rest goes on."""

    def __init__(
        self,
        engine: StreamingEngine,
        *,
        raw: bool,
        template_options: Mapping[str, Any],
        complain: Callable[[str], None],
    ) -> None:
        """``raw``: texts are continued as they are, else they are questions."""
        self._engine, self._raw, self._complain = engine, raw, complain
        self._template_options = template_options

    def run(self, path: Path, done: int, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """One record for each line after the first ``done`` that is not blank, in order."""
        numbers: list[int] = []
        texts: dict[int, ChoiceText] = {}
        reader = Reader(self._engine.tokenizer, options, raw=self._raw)

        def prompts() -> Iterator[Encoded]:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if number > done and line.strip():
                        numbers.append(number)
                        found = self._encode(line, reader)
                        if isinstance(found, Exception):
                            yield found
                        else:
                            ids, texts[number] = found
                            yield ids

        for result in self._engine.completions(prompts(), **reader.options):
            number = numbers[result.index]
            text = texts.pop(number, None)
            if result.error is None and text is not None:
                text.push(result.text)
                text.finish()
                yield record(number, result, text.whole)
                continue
            message = " ".join(str(result.error).split())
            self._complain(f"{path}, line {number}: {message}")
            yield {"line": number, "error": message}

    def _encode(self, line: bytes, reader: Reader) -> tuple[list[int], ChoiceText] | Exception:
        """Token ids and what reads the text behind them, or what is wrong with the line."""
        try:
            found = self._prompt(read_line(line))
            ids = reader.begin(self._engine.encode(found, self._template_options))
            return ids, reader.text(ids)
        except (ValueError, OSError) as error:
            return without_frames(error)

    def _prompt(self, found: Any) -> Prompt:
        if isinstance(found, Mapping):
            keys = set(found) & {"prompt", "messages"}
            if len(keys) != 1:
                raise ValueError('must have one of "prompt" and "messages"')
            key = keys.pop()
            found = found[key]
            if key == "messages" and not _are_messages(found):
                raise ValueError('"messages" must be a list of objects')
        if isinstance(found, str):
            return found if self._raw else [{"role": "user", "content": found}]
        if not isinstance(found, list):
            raise ValueError("must be a string, or an object with a prompt or messages")
        return found


def _are_messages(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(item, Mapping) for item in found)


def read_line(line: bytes) -> Any:
    """The JSON of a line; ValueError if it is none. A mark of byte order before it is not of it."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error


def record(line: int, result: Completion, text: Delta) -> dict[str, Any]:
    """What is written of a result, with all of its text; "reasoning" is there if there is any."""
    return {
        "line": line,
        "text": text.answer,
        **({"reasoning": text.reasoning} if text.reasoning else {}),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.ids),
    }


def open_results(path: Path) -> tuple[IO[bytes], int]:
    """A file of results to append to, and the line of prompts that it has come to."""
    last = 0

    def hear(found: Any) -> None:
        nonlocal last
        last = int(found["line"])

    file = append_to(path, b'{"line": ', hear)
    return file, last


def append_to(path: Path, begins: bytes, hear: Callable[[Any], object]) -> IO[bytes]:
    """A file of results to append to, all of which begin with ``begins``; ``hear`` gets each that
    is there. A last line that was cut off is taken away.

    ValueError for a file of something else, of which ``hear`` raises ValueError, KeyError or
    TypeError, and for one that another process appends to.
    """
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "ab"))
        _lock(file, path)
        os.truncate(path, _whole(path, begins, hear))
        opened.pop_all()
    return file


def _whole(path: Path, begins: bytes, hear: Callable[[Any], object]) -> int:
    """Bytes of the lines that were not cut off."""
    whole = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if line[: len(begins)] != begins[: len(line)]:
                    raise ValueError(line)
                if line.endswith(b"\n"):
                    hear(json.loads(line))
                    whole += len(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: is no file of results, nothing is appended to it"
                ) from error
    return whole


def _lock(file: IO[bytes], path: Path) -> None:
    """Until the file is closed, where its file system knows locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path}: another process appends to it") from error
    except OSError:
        return


def write_record(file: IO[bytes], found: Mapping[str, Any]) -> None:
    """One line, on disk before the next."""
    file.write(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    file.flush()
    if file.seekable():
        os.fsync(file.fileno())
