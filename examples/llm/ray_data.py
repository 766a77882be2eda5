"""For Ray Data: a class that answers batches of rows, each actor with an engine of its own.

    dataset.map_batches(
        AnswerRows, fn_constructor_args=("path/to/model",), batch_size=256,
        num_gpus=1, concurrency=2,
    )

Ray itself is not imported: an actor's GPU is the one that Ray lets it see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .batching.room import many_rows
from .engine import StreamingEngine
from .errors import without_frames
from .opening import Model
from .text.prompts import Prompt
from .text.requests import Encoded

RESULTS = ("text", "finish_reason", "prompt_tokens", "new_tokens", "error")
"""Columns that are added; those of these names are replaced."""


class AnswerRows:
    """Rows to rows with their texts. All rows of a batch share the passes, so that batches should
    have hundreds.

    A row has a ``prompt`` (a question, or with ``raw`` a text to be continued; token ids) or
    ``messages``. What it had comes back, and beside it RESULTS: ``error`` is "" unless the row has
    failed, alone; ``text`` is then what there was. Thread rules: one thread, as an actor has.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        raw: bool = False,
        answers: Mapping[str, Any] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Open the engine, with ``options`` of :class:`StreamingEngine`: many rows at a time where
        they do not say how many. ``answers``: options of ``generate`` for all rows; with a seed,
        row i of a batch takes seed + i. Errors are those of the engine."""
        self._raw, self._answers = raw, dict(answers or {})
        self._template_options = dict(template_options or {})
        found = Model.read(model, lambda _: None, options.pop("layer_pattern", None))
        _ = found.tokenizer  # the error of a model without one
        self._engine = StreamingEngine(found, **{**many_rows(found, options), **options})
        try:
            self._engine.requests((), **self._answers)  # the error of options, before any row
        except BaseException:
            self._engine.close()
            raise

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as Ray's ``batch_format="numpy"`` has it: columns of equally many rows.

        Raises what ends all rows, such as an error of the disk: Ray may then try again.
        """
        results = list(self._engine.completions(self._encoded(batch), **self._answers))
        columns: dict[str, Any] = {
            "text": _objects([done.text for done in results]),
            "finish_reason": _objects([done.finish_reason for done in results]),
            "prompt_tokens": np.array([done.prompt_tokens for done in results], dtype=np.int64),
            "new_tokens": np.array([len(done.ids) for done in results], dtype=np.int64),
            "error": _objects([_told(done.error) for done in results]),
        }
        return {**batch, **columns}

    def close(self) -> None:
        """Return all memory. Idempotent."""
        self._engine.close()

    def _encoded(self, batch: Mapping[str, Any]) -> Iterator[Encoded]:
        prompts, messages = batch.get("prompt"), batch.get("messages")
        if prompts is None and messages is None:
            raise ValueError(f"the rows have no prompt and no messages, but {', '.join(batch)}")
        columns = [column for column in (prompts, messages) if column is not None]
        for found in zip(*columns, strict=True):
            try:
                yield self._engine.encode(self._prompt(found), self._template_options)
            except (ValueError, OSError) as error:
                yield without_frames(error)

    def _prompt(self, found: Sequence[Any]) -> Prompt:
        """ValueError for none, and for several."""
        given = [one for one in map(_plain, found) if one is not None]
        if len(given) != 1:
            raise ValueError("a row must have one of prompt and messages")
        (one,) = given
        if isinstance(one, str):
            return one if self._raw else [{"role": "user", "content": one}]
        if not isinstance(one, list):
            raise ValueError("a prompt must be a text, messages or token ids")
        return one


def _plain(value: Any) -> Any:
    """What a column holds, without numpy; of a struct the fields that this row has."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def _objects(values: Sequence[str]) -> Any:
    """A column of texts, also of none."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _told(error: Exception | None) -> str:
    return "" if error is None else " ".join(str(error).split()) or type(error).__name__
