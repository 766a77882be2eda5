"""``examples/ray_batch.py``: what it says without Ray, and a cluster that loses an actor."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_model import byte_model
from paths import PYTHONPATH, TESTS

from examples import ray_batch
from layer_streamer.llm.batching.row_files import JsonLines
from layer_streamer.llm.ray_data import RESULTS, AnswerLines

HELPERS = TESTS / "helpers" / "serving"
FEW, MANY = 40, 200
ARGUMENTS = (
    "--actors", "2", "--batch-size", "16", "--max-new-tokens", "8", "--temperature", "1",
    "--seed", "7", "--max-length", "64",
)  # fmt: skip


def rows_in(path: Path, count: int) -> Path:
    rows = [{"id": f"{i}", "prompt": f"Why {i}?"} for i in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return rows_in(tmp_path / "in.jsonl", FEW)


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed."""
    monkeypatch.setattr(ray_batch, "find_spec", lambda name: name)


def found(row: int) -> dict[str, Any]:
    return {"line": row, "text": f"{row}!", "finish_reason": "stop", "prompt_tokens": 3,
            "new_tokens": 2, "error": ""}  # fmt: skip


def answer(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> list[int]:
    """Has Ray answer these rows; the first rows of the pieces that it is asked for."""
    asked: list[int] = []

    def answers(args: Any, source: Any, pieces: list[dict[str, int]]) -> Iterator[dict[str, Any]]:
        asked.extend(piece["row"] for piece in pieces)
        yield from map(found, rows)

    monkeypatch.setattr(ray_batch, "answers", answers)
    return asked


def test_without_ray_one_line_says_what_to_install(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(ray_batch, "find_spec", lambda name: None)
    assert ray_batch.main(["model", str(source), "out.jsonl"]) == 2
    told = "error: ray is not installed (pip install 'layer-streamer[ray]')\n"
    assert capfd.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("in.csv", "out.jsonl"), "in.csv: must end in .jsonl, .ndjson, .parquet"),
        (("in.jsonl", "out"), "out: must end in"),
        (("absent.jsonl", "out.jsonl"), "absent.jsonl: No such file"),
        (("in.jsonl", "in.jsonl"), "in.jsonl: is there already"),
        (("in.jsonl",), "required: OUT"),
        (("in.jsonl", "out.jsonl", "--actors", "0"), "--actors: 0: must be at least 1"),
        (("in.jsonl", "out.jsonl", "--plan"), "unrecognized arguments: --plan"),
    ],
)
@pytest.mark.usefixtures("with_ray")
def test_arguments_that_make_no_sense_are_one_line(
    source: Path, arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(source.parent)
    assert ray_batch.main(["model", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and told in err and err.count("\n") == 1
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]


@pytest.mark.usefixtures("with_ray")
def test_rows_that_are_answered_are_not_asked_for_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    output = source.with_name("out.jsonl")
    arguments = ["model", str(source), str(output), "--batch-size", "16"]
    answer(monkeypatch, [*range(1, 21)])
    assert ray_batch.main(arguments) == 2
    assert capfd.readouterr().err == "error: row 21 came without an answer\n"
    assert not output.exists()
    asked = answer(monkeypatch, [*range(17, FEW + 1)])
    assert ray_batch.main(arguments) == 0
    assert asked == [*range(17, FEW + 1, 16)]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{i}" for i in range(FEW)]
    assert [row["text"] for row in rows] == [f"{i}!" for i in range(1, FEW + 1)]
    assert {path.name for path in source.parent.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.usefixtures("with_ray")
def test_a_row_that_is_lost_is_an_error_and_one_that_comes_twice_is_written_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    output = source.with_name("out.jsonl")
    arguments = ["model", str(source), str(output)]
    answer(monkeypatch, [1, 2, 2, 1, 4, 5])
    assert ray_batch.main(arguments) == 2
    assert capfd.readouterr().err == "error: row 3 came without an answer\n"
    lines = source.with_name("out.jsonl.part").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2]


def test_actors_take_what_machines_have() -> None:
    cpu, gpus = {"CPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}
    shares = ray_batch.shares
    assert shares([cpu, {"CPU": 6.0}, {}], None, None, None) == (2, {"num_gpus": 0, "num_cpus": 6})
    assert shares([cpu], 3, None, None) == (3, {"num_gpus": 0, "num_cpus": 2})
    assert shares([cpu], 90, None, None) == (90, {"num_gpus": 0, "num_cpus": 1})
    assert shares([cpu, gpus, gpus], None, None, None) == (8, {"num_gpus": 1.0})
    assert shares([gpus], None, 0.5, 3) == (8, {"num_gpus": 0.5, "num_cpus": 3})
    assert shares([gpus], 5, 0, None) == (5, {"num_gpus": 0, "num_cpus": 12})
    for asked in ((None, 8.0, None), (None, None, 65)):
        with pytest.raises(ValueError, match="no machine of the cluster has so many"):
            shares([cpu, gpus | {"GPU": 0.0}], *asked)


def test_of_what_ray_says_a_line_is_left() -> None:
    raised = '\x1b[36mray::A()\x1b[39m (pid=1)\n  File "a.py", line 3\n    x\nOSError: [Errno 5] a'
    again = "\n\nThe above exception was the direct cause of the following exception:\n\nray::A()"
    assert ray_batch.cause_of(raised + again) == "OSError: [Errno 5] a"
    assert ray_batch.cause_of("The actor died.\n\tpid: 3\n") == "The actor died. pid: 3"


@pytest.mark.slow
def test_an_actor_that_is_killed_costs_no_row_and_doubles_none(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs the extra [ray]")
    model = byte_model(tmp_path / "model")
    source = rows_in(tmp_path / "in.jsonl", MANY)
    os.mkfifo(tmp_path / "said")
    output = tmp_path / "out.jsonl"
    environment = os.environ | {
        "PYTHONPATH": f"{PYTHONPATH}{os.pathsep}{HELPERS}", "OMP_NUM_THREADS": "1",
        "MORTAL_ROWS": str(tmp_path),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray leaves one in the home directory
    }  # fmt: skip
    command = [sys.executable, "-c", "import mortal_rows; mortal_rows.run()"]
    said = os.open(tmp_path / "said", os.O_RDONLY | os.O_NONBLOCK)
    with (
        open(tmp_path / "err", "wb") as err,
        subprocess.Popen(
            [*command, str(model), str(source), str(output), *ARGUMENTS],
            env=environment, stdout=subprocess.DEVNULL, stderr=err,
        ) as run,
    ):  # fmt: skip
        try:
            assert select.select([said], [], [], 300)[0], "no actor came to its second batch"
            os.kill(int(os.read(said, 99)), signal.SIGKILL)
            run.wait(300)
        finally:
            run.kill()  # what is left of the cluster ends with it
            os.close(said)
    assert run.returncode == 0, (tmp_path / "err").read_text()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{i}" for i in range(MANY)]
    answers = {"max_new_tokens": 8, "temperature": 1, "seed": 7}
    alone = AnswerLines(model, device="cpu", max_length=64, answers=answers)
    (piece,) = JsonLines(source, ("prompt", "messages")).pieces(MANY)
    lines = JsonLines(source, ("prompt", "messages")).read(piece)
    expected = alone({"row": np.arange(1, MANY + 1), "line": np.array(lines, dtype=object)})
    alone.close()
    for name in RESULTS:
        assert [row[name] for row in rows] == expected[name].tolist()
    assert len({row["text"] for row in rows}) > MANY // 2  # by seeds of their own
