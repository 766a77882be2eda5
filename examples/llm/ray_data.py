"""For Ray Data: classes that answer batches of rows, each actor with an engine of its own.

    dataset.map_batches(
        AnswerRows, fn_constructor_args=("path/to/model",), batch_size=256,
        num_gpus=1, compute=ray.data.ActorPoolStrategy(size=2),
    )

Ray itself is not imported: an actor's GPU is the one that Ray lets it see. A whole program is
examples/ray_batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .batching.room import many_rows
from .engine import StreamingEngine
from .errors import without_frames
from .opening import Model
from .text.prompt_file import read_line
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
        prompts, messages = batch.get("prompt"), batch.get("messages")
        if prompts is None and messages is None:
            raise ValueError(f"the rows have no prompt and no messages, but {', '.join(batch)}")
        columns = [column for column in (prompts, messages) if column is not None]
        return {**batch, **self._results(zip(*columns, strict=True), self._answers)}

    def close(self) -> None:
        """Return all memory. Idempotent."""
        self._engine.close()

    def _results(
        self, rows: Iterable[Sequence[Any] | Exception], answers: Mapping[str, Any]
    ) -> dict[str, Any]:
        """RESULTS of rows: each what its columns have, or what is wrong with it."""
        results = list(self._engine.completions(map(self._encoded, rows), **answers))
        return {
            "text": _objects([done.text for done in results]),
            "finish_reason": _objects([done.finish_reason for done in results]),
            "prompt_tokens": np.array([done.prompt_tokens for done in results], dtype=np.int64),
            "new_tokens": np.array([len(done.ids) for done in results], dtype=np.int64),
            "error": _objects([_told(done.error) for done in results]),
        }

    def _encoded(self, found: Sequence[Any] | Exception) -> Encoded:
        try:
            if isinstance(found, Exception):
                raise found
            return self._engine.encode(self._prompt(found), self._template_options)
        except (ValueError, OSError) as error:
            return without_frames(error)

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


class AnswerLines(AnswerRows):
    """Lines of JSON to their answers: a column ``line`` of them, and ``row``, their numbers in the
    whole (from 1), one after the other. RESULTS come back, and ``row``.

    A line is an object with a prompt or messages, by whatever ``names`` say. With a seed, row r
    takes seed + r - 1: the same text, however rows are cut into batches.
    """

    def __init__(
        self, model: str | Path, names: tuple[str, str] = ("prompt", "messages"), **options: Any
    ) -> None:
        """``options``: those of :class:`AnswerRows`."""
        super().__init__(model, **options)
        self._names = names

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch, as of AnswerRows. ValueError for rows that are not one after the other."""
        rows, answers = batch["row"], self._answers
        if not np.all(np.diff(rows) == 1):
            raise ValueError("the rows of a batch must be one after the other")
        if len(rows) and answers.get("seed") is not None:
            answers = {**answers, "seed": answers["seed"] + int(rows[0]) - 1}
        return {"row": rows, **self._results(map(self._read, batch["line"]), answers)}

    def _read(self, line: bytes) -> Sequence[Any] | Exception:
        try:
            found = read_line(line)
            if not isinstance(found, Mapping):
                raise ValueError("a line must be an object with a prompt or messages")
        except ValueError as error:
            return without_frames(error)
        return [found.get(name) for name in self._names]


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
