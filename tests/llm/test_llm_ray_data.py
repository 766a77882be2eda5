"""Batches of rows as Ray Data hands them over, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_model import byte_model

from layer_streamer import ReadError
from layer_streamer.llm.ray_data import RESULTS, AnswerLines, AnswerRows

OPTIONS: dict[str, Any] = {"device": "cpu", "max_length": 64}
ANSWERS = {"max_new_tokens": 4}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def rows(path: Path) -> Iterator[AnswerRows]:
    found = AnswerRows(path, answers=ANSWERS, **OPTIONS)
    yield found
    found.close()


def objects(*values: Any) -> Any:
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def test_every_row_has_the_text_that_the_engine_gives(rows: AnswerRows) -> None:
    batch = {"id": np.arange(3), "prompt": np.array(["Hi", "What?", "Hi"])}
    found = rows(batch)
    assert [*found] == ["id", "prompt", *RESULTS]
    assert all(len(column) == 3 for column in found.values()) and found["id"] is batch["id"]
    expected = [rows._engine.generate([{"role": "user", "content": text}], **ANSWERS)
                for text in ("Hi", "What?", "Hi")]  # fmt: skip
    assert found["text"].tolist() == expected
    assert found["new_tokens"].tolist() == [4] * 3 and set(found["error"]) == {""}


def test_messages_and_ids_come_in_whatever_columns_make_of_them(rows: AnswerRows) -> None:
    expected = [rows._engine.generate(prompt, **ANSWERS) for prompt in (HI, [72, 105])]
    struct = np.array([{"role": "user", "content": "Hi", "name": None}], dtype=object)
    assert set(rows({"messages": objects(HI, struct)})["text"]) == {expected[0]}
    assert rows({"prompt": np.array([[72, 105]])})["text"].tolist() == [expected[1]]
    mixed = {"prompt": objects(None, "Hi"), "messages": objects(HI, None)}
    assert set(rows(mixed)["text"]) == {expected[0]}


def test_a_bad_row_is_its_own_error(rows: AnswerRows) -> None:
    bad = ("long " * 50, 3, None, [999], [], [{"role": 5}], float("nan"), "half \ud83d")
    found = rows({"prompt": objects("Hi", *bad, "Hi")})
    assert [bool(error) for error in found["error"]] == [False, *[True] * len(bad), False]
    assert all("\n" not in error for error in found["error"])
    assert found["text"][0] == found["text"][-1] != ""


def test_no_rows_are_no_error_and_no_prompts_are(rows: AnswerRows) -> None:
    assert [len(column) for column in rows({"prompt": objects()}).values()] == [0] * 6
    with pytest.raises(ValueError, match="no prompt and no messages, but id"):
        rows({"id": np.arange(2)})


def test_what_ends_all_rows_is_raised_and_the_next_batch_is_answered(
    rows: AnswerRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows({"prompt": objects("Hi")})["text"].tolist()

    def failing(*arguments: Any, **options: Any) -> Any:
        raise ReadError("layer 1: I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(rows._engine._runner, "forward", failing)
        with pytest.raises(ReadError):
            rows({"prompt": objects("Hi", "Ho")})
    assert rows({"prompt": objects("Hi")})["text"].tolist() == expected


def test_options_that_make_no_sense_are_told_when_it_is_made(path: Path) -> None:
    with pytest.raises(ValueError, match=r"top_p=3\.0"):
        AnswerRows(path, answers={"top_p": 3}, **OPTIONS)
    with pytest.raises(ValueError, match="max_length=900"):
        AnswerRows(path, device="cpu", max_length=900)


def test_many_rows_share_the_passes_where_nobody_says_how_many(path: Path) -> None:
    found = AnswerRows(path, raw=True, device="cpu", answers={"max_new_tokens": 1})
    assert found._engine.max_batch == 256
    assert found({"prompt": objects("Hi")})["text"][0] == found._engine.generate(
        "Hi", max_new_tokens=1
    )
    found.close()


def test_a_line_has_the_text_of_its_number_however_lines_are_cut_into_batches(path: Path) -> None:
    answers = {"max_new_tokens": 4, "temperature": 1, "seed": 3}
    lines = AnswerLines(path, names=("asked", "said"), answers=answers, **OPTIONS)
    column = objects(*[b'{"asked": "Hi"}', b'{"said": [{"role": "user", "content": "Hi"}]}'] * 3)
    rows = np.arange(7, 13)
    whole = lines({"row": rows, "line": column})
    assert [*whole] == ["row", *RESULTS] and whole["row"].tolist() == rows.tolist()
    assert len(set(whole["text"])) > 1
    parts = [lines({"row": rows[at], "line": column[at]}) for at in (slice(0, 1), slice(1, 6))]
    for name in RESULTS:
        assert np.concatenate([part[name] for part in parts]).tolist() == whole[name].tolist()
    with pytest.raises(ValueError, match="rows of a batch must be one after the other"):
        lines({"row": np.array([7, 9]), "line": column[:2]})
    lines.close()


def test_a_bad_line_is_its_own_error(path: Path) -> None:
    lines = AnswerLines(path, answers=ANSWERS, **OPTIONS)
    bad = (b"", b"[1]", b'"Hi"', b"{}", b"\xff{}", b'{"prompt": "Hi"', b"[" * 99_999,
           b'{"prompt": "Hi", "messages": []}', b'{"prompt": {"a": 1}}')  # fmt: skip
    good = b'\xef\xbb\xbf{"prompt": "Hi"}\r\n'
    found = lines({"row": np.arange(len(bad) + 1), "line": objects(*bad, good)})
    assert [bool(error) for error in found["error"]] == [*[True] * len(bad), False]
    assert all("\n" not in error for error in found["error"]) and found["text"][-1] != ""
    lines.close()
