"""``layer-streamer experts``: the table, the JSON, the errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_traces import write_trace, zipf_trace

from layer_streamer.__main__ import main
from layer_streamer.experts.policies import POLICIES
from layer_streamer.experts.simulate import simulate
from layer_streamer.experts.trace import Trace, TraceHeader

TRACE = zipf_trace(TraceHeader(num_layers=4, num_experts=16, top_k=2, expert_nbytes=2_000_000), 50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "trace.jsonl", TRACE)


def simulated(capsys: Any, *arguments: object) -> tuple[list[str], Any]:
    """The table and the document."""
    assert main(["experts", *map(str, arguments)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


def test_the_document_has_a_row_for_each_policy_pool_and_number_of_slots(
    path: Path, capsys: Any
) -> None:
    _, document = simulated(capsys, path, "--slots", 4, "--slots", 8)
    rows = [
        {"slots": one.slots, "pool": one.pool, "policy": one.policy, "hits": one.hits,
         "nbytes_a_token": one.nbytes_a_token}
        for one in simulate(TRACE, [4, 8], POLICIES, TRACE)
    ]  # fmt: skip
    assert document["rows"] == rows and len(rows) == 2 * 2 * (len(POLICIES) + 1)
    assert (document["asked"], document["tokens"], document["passes"]) == (400, 50, 50)
    assert document["expert_nbytes"] == 2_000_000


def test_the_table_says_what_the_document_says(path: Path, capsys: Any) -> None:
    table, document = simulated(capsys, path, "--slots", 6)
    assert "50 tokens in 50 passes, 4 layers of 16 experts, 2 for a token" in table[0]
    assert "an expert is 2.00 MB" in table[0]
    assert table[1] == "asked for 400 experts: 16.0 MB a token"
    cells = {line.split()[0]: line.split()[1:] for line in table[4:9]}
    assert list(cells) == [*POLICIES, "belady"]
    for name, (share, megabytes, *others) in cells.items():
        rows = [row for row in document["rows"] if row["policy"] == name]
        assert share == f"{rows[0]['hits'] / 400:.1%}"
        assert megabytes == f"{rows[0]['nbytes_a_token'] / 1e6:.1f}"
        assert others == [
            f"{rows[1]['hits'] / 400:.1%}", f"{rows[1]['nbytes_a_token'] / 1e6:.1f}"
        ]  # fmt: skip
    assert table[9].endswith("this trace itself asks for most")


def test_policies_that_are_named_stand_alone_beside_belady(path: Path, capsys: Any) -> None:
    table, document = simulated(capsys, path, "--slots", 4, "--policy", "lru", "--policy", "lru")
    assert {row["policy"] for row in document["rows"]} == {"lru", "belady"}
    assert len(document["rows"]) == 4
    assert not any("fixed" in line for line in table)


def test_without_the_size_of_an_expert_there_are_hits_alone(tmp_path: Path, capsys: Any) -> None:
    header = replace(TRACE.header, expert_nbytes=None)
    path = write_trace(tmp_path / "t", replace(TRACE, header=header))
    table, document = simulated(capsys, path, "--slots", 4)
    assert "MB" not in "\n".join(table)
    assert {row["nbytes_a_token"] for row in document["rows"]} == {None}


def test_a_fixed_set_may_come_from_another_trace(path: Path, tmp_path: Path, capsys: Any) -> None:
    other = write_trace(tmp_path / "other", zipf_trace(TRACE.header, 50, seed=3))
    table, document = simulated(capsys, path, "--slots", 4, "--fixed-from", other)
    assert document["fixed_from"] == str(other)
    assert any(f"its set is what {other} asks for most" in line for line in table)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--slots", "4"], "nowhere: No such file or directory"),
        (["trace.jsonl"], "the following arguments are required: --slots"),
        (["trace.jsonl", "--slots", "0"], "argument --slots: 0: must be at least 1"),
        (["trace.jsonl", "--slots", "4", "--policy", "mru"], "invalid choice: 'mru'"),
        (["trace.jsonl", "--slots", "4", "--fixed-from", "other"], "other: No such file"),
        (["damaged", "--slots", "4"], "damaged:3: not JSON"),
        (["empty", "--slots", "4"], "empty: a trace without a pass"),
    ],
)
def test_what_is_wrong_is_one_line_on_stderr_and_exit_code_2(
    path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(path.parent)
    lines = path.read_text().splitlines()
    Path("damaged").write_text("\n".join([*lines[:2], lines[2][:10], *lines[3:]]) + "\n")
    write_trace(Path("empty"), Trace(TRACE.header, ()))
    assert main(["experts", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert said in line
