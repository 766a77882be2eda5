"""``layer-streamer batch``: files in, files out, through the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from paths import PYTHONPATH

from layer_streamer.tools import batch_command, cli, command

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("batch"), max_position_embeddings=1024)


def write(path: Path, count: int, **options: Any) -> Path:
    found = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": HI, "max_tokens": 3, **options}}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(one)}\n" for one in found))
    return path


def run(model: Path, *arguments: str | Path) -> int:
    return cli.main(["batch", str(model), *map(str, arguments), "--device", "cpu"])


def lines_in(path: Path) -> list[int]:
    return sorted(json.loads(line)["line"] for line in path.read_bytes().splitlines())


def test_shards_are_answered_and_said_in_a_line(model: Path, tmp_path: Path, capfd: Any) -> None:
    source = write(tmp_path / "in", 7)
    for part, numbers in ((1, [1, 3, 5, 7]), (2, [2, 4, 6])):
        output = tmp_path / f"{part}"
        assert run(model, source, output, "--shard", f"{part}/2", "--max-length", "64") == 0
        assert lines_in(output) == numbers
        out, err = capfd.readouterr()
        assert out == "" and f"{len(numbers)} lines answered; {3 * len(numbers)} tokens" in err
    assert run(model, source, output, "--shard", "2/2") == 0
    assert capfd.readouterr().err == f"every line has its answer: {output}\n"
    assert lines_in(output) == [2, 4, 6]


def test_what_the_command_says_holds_for_lines_that_do_not(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text('"Hi"\n{"prompt": "Hi", "max_tokens": 4}\n{"prompt": [72, 105]}\n')
    options = ["--max-new-tokens", "2", "--logit-bias", "65=100", "--raw", "--max-length", "64"]
    assert run(model, source, tmp_path / "out", *options) == 0
    found = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    texts = {one["line"]: one["response"]["body"]["choices"][0]["text"] for one in found}
    assert texts == {1: "AA", 2: "AAAA", 3: "AA"}


def test_hundreds_of_rows_share_the_passes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    most = 0

    def show(bar: Any, counts: Any, seconds: float) -> None:
        nonlocal most
        most = max(most, counts.rows)

    monkeypatch.setattr(batch_command, "show", show)
    source = write(tmp_path / "in", 260, max_tokens=2)
    assert run(model, source, tmp_path / "out") == 0
    assert most == 256 and lines_in(tmp_path / "out") == list(range(1, 261))
    assert "260 lines answered; 520 tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: No such file"),
        (["in", "in"], "is the file of requests itself"),
        (["in", "folder/out"], "folder/out: No such file"),
        (["in", "out", "--shard", "4/3"], "--shard: '4/3'"),
        (["in", "thesis"], "thesis: is no file of results"),
        (["in", "out", "--kv", "disk"], "kv='disk'"),
        (["in", "out", "--top-p", "3"], "top_p=3.0"),
        (["in", "out", "--logit-bias", "999=1"], "999"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_changes_nothing(
    model: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", 1)
    (tmp_path / "thesis").write_text("my thesis")
    assert run(model, *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert (tmp_path / "thesis").read_text() == "my thesis"


def test_without_pydantic_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "pydantic" else 1)
    assert cli.main(["batch", "x.gguf", "in", "out"]) == 2
    expected = "error: pydantic is not installed (pip install 'layer-streamer[serve]')\n"
    assert capfd.readouterr().err == expected


def start(model: Path, source: Path, output: Path) -> subprocess.Popen[bytes]:
    arguments = ["batch", str(model), str(source), str(output), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "layer_streamer", *arguments, "--max-batch", "4"],
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_was_killed_goes_on_until_every_line_is_answered_once(
    model: Path, tmp_path: Path, how: signal.Signals
) -> None:
    source, output = write(tmp_path / "in", 300, max_tokens=30), tmp_path / "out"
    seen = 0
    for _ in range(2):
        with start(model, source, output) as process:
            assert process.stderr is not None
            grown = seen
            while grown < seen + 10:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                assert process.returncode is None, process.stderr.read()
                grown = output.read_bytes().count(b"\n") if output.exists() else 0
            process.send_signal(how)
            err = process.stderr.read()
        assert process.returncode == (-9 if how == signal.SIGKILL else 130), err
        assert b"Traceback" not in err
        assert how == signal.SIGKILL or b"goes on when it is started again" in err
        seen = output.read_bytes().count(b"\n")
    assert 20 <= seen < 300
    with start(model, source, output) as process:
        assert process.wait() == 0
    assert lines_in(output) == list(range(1, 301))
