"""What is learned of a row: its tokens, and which of them the model is to say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import one_line_errors
from ..text.tokenizer import raw_ids, rendered_ids
from .rows import Row

UNSAID = -100
"""The label of a token that is not learned."""


class Sample(NamedTuple):
    """The tokens of one row; labels are those that are learned, else :data:`UNSAID`."""

    ids: list[int]
    labels: list[int]

    def cut(self, length: int) -> Sample:
        """Its first tokens."""
        return Sample(self.ids[:length], self.labels[:length])

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(label != UNSAID for label in self.labels)


class Samples(NamedTuple):
    """All rows of a file."""

    samples: list[Sample]
    longer: int
    """How many were longer than the most tokens of a row: their end is cut off."""
    unlearned: list[int]
    """Lines that are left out, as nothing was left to be learned of them."""


def encode_rows(tokenizer: Any, rows: Iterable[Row], path: Path, length: int) -> Samples:
    """Tokens of rows, of at most ``length`` each.

    Of a chat the assistant's messages are learned, as far as the chat template writes them as it
    would have when they were to be said; of a text all of it, and that it ends; of a prompt and its
    completion the latter. ValueError, naming the line, for a row that has no tokens.
    """
    found, longer, unlearned = [], 0, []
    for row in rows:
        try:
            with one_line_errors("the tokenizer or its chat template refuses it", ValueError):
                sample = _encode(tokenizer, row)
            sample.labels[:1] = [UNSAID]  # the first token is said by none
        except ValueError as error:
            raise ValueError(f"{path}, line {row.line}: {error}") from error
        longer += len(sample.ids) > length
        sample = sample.cut(length)
        if sample.learned:
            found.append(sample)
        else:
            unlearned.append(row.line)
    if not found:
        raise ValueError(f"{path}: nothing of it can be learned within {length} tokens a row")
    return Samples(found, longer, unlearned)


def _encode(tokenizer: Any, row: Row) -> Sample:
    if row.messages is not None:
        return _chat(tokenizer, row.messages, row.content.get("tools"))
    if "text" in row.content:
        ids = raw_ids(tokenizer, row.content["text"]) + _end(tokenizer)
        return Sample(ids, list(ids))
    prompt = raw_ids(tokenizer, row.content["prompt"])
    said = rendered_ids(tokenizer, row.content["completion"]) + _end(tokenizer)
    return Sample(prompt + said, [UNSAID] * len(prompt) + said)


def _end(tokenizer: Any) -> list[int]:
    """That a text is over, for tokenizers that know of it."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any) -> Sample:
    if not tokenizer.chat_template:
        raise ValueError("is a chat, and the model's tokenizer has no chat template")
    ids: list[int] = []
    labels: list[int] = []
    for text, said in _parts(tokenizer, messages, tools):
        part = rendered_ids(tokenizer, text)
        ids += part
        labels += part if said else [UNSAID] * len(part)
    return Sample(ids, labels)


def _parts(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any
) -> Iterator[tuple[str, bool]]:
    """The chat's text, cut where the assistant begins to speak and where it has ended, as it is cut
    when it answers; and whether it is the assistant who speaks."""

    def written(count: int, *, asks: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages[:count]), tools=tools, tokenize=False, add_generation_prompt=asks
        )
        return text

    whole, at = written(len(messages)), 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, end = written(index, asks=True), written(index + 1)
        # A template may write an earlier message in another way than when it was said (without its
        # reasoning, say): then that is not what the model has to learn.
        if at <= len(begin) < len(end) and end.startswith(begin) and whole.startswith(end):
            yield whole[at : len(begin)], False
            yield whole[len(begin) : len(end)], True
            at = len(end)
    if not at:
        raise ValueError("the chat template does not show where an answer begins and ends")
    if at < len(whole):
        yield whole[at:], False
