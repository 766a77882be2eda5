"""The files of a batch: whose a line is, and what a file of results will not take."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.batching.asked import read
from layer_streamer.llm.batching.lines import Shard
from layer_streamer.llm.batching.results import Results
from layer_streamer.llm.serving.api_error import ApiError


@given(st.integers(1, 40), st.integers(1, 10**9), st.integers(1, 10**9))
def test_every_line_is_of_one_shard(of: int, number: int, part: int) -> None:
    assert sum(Shard.read(f"{k}/{of}").has(number) for k in range(1, of + 1)) == 1
    if part > of:
        with pytest.raises(ValueError, match="from 1/10 to 10/10"):
            Shard.read(f"{part}/{of}")


@pytest.mark.parametrize("text", ["", "0/3", "3", "1/0", "-1/3", "1/3/3", "a/b", "1/ 3", "१/३"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 3/10"):
        Shard.read(text)


@pytest.mark.parametrize("held", [b"my thesis\n", b"my thesis", b'{"id": 3}\n', b'"Hi"\n{"id": "b'])
def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "out").write_bytes(held)
    with pytest.raises(ValueError, match="is no file of results"):
        Results(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == held


def test_a_file_of_results_has_one_that_appends_to_it(tmp_path: Path) -> None:
    with (
        closing(Results(tmp_path / "out")),
        pytest.raises(ValueError, match="another process appends"),
    ):
        Results(tmp_path / "out")
    Results(tmp_path / "out").close()


def test_json_that_is_nested_deep_is_refused_for_that() -> None:
    assert read(b"[" * 64 + b"]" * 64)
    with pytest.raises(ApiError, match="nested deeper than 64"):
        read(b"[" * 65 + b"]" * 65)
