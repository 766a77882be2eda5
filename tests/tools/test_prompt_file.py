"""A file of prompts to a file of results, through the script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from paths import ROOT

from layer_streamer import ReadError
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.text.stopping import TextStream
from layer_streamer.tools import cli

OPTIONS = ["--max-new-tokens", "5", "--device", "cpu", "--raw"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("prompts"))


def write_prompts(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model: Path, prompts: Path, output: Path, *more: str) -> int:
    arguments = [str(model), "--prompts", str(prompts), "--output", str(output), *OPTIONS, *more]
    return cli.main(["generate", *arguments])


def test_every_line_is_answered_in_order(model: Path, tmp_path: Path, capfd: Any) -> None:
    prompts = write_prompts(tmp_path / "in", ["One", {"prompt": "Two " * 40}, "Three", "Four"])
    assert run(model, prompts, tmp_path / "out", "--max-batch", "2") == 0
    found = results(tmp_path / "out")
    assert [record["line"] for record in found] == [1, 2, 3, 4]
    assert capfd.readouterr().out == ""
    for record, text in zip(found, ["One", "Two " * 40, "Three", "Four"], strict=True):
        assert cli.main(["generate", str(model), "--prompt", text, *OPTIONS]) == 0
        assert capfd.readouterr().out == record["text"]
        assert (record["new_tokens"], record["finish_reason"]) == (5, "length")


def test_a_bad_line_is_named_and_the_rest_goes_on(model: Path, tmp_path: Path, capfd: Any) -> None:
    prompts = tmp_path / "in"
    good = [b'"One"', b'{"messages": [{"role": "user", "content": "Two"}]}']
    bad = [
        b"not JSON", b'{"text": 1}', b'{"prompt": ""}', b"3", b'"' + b"a " * 400 + b'"',
        b'{"messages": [{"role": "user"}]}', b'"\xff"',
    ]  # fmt: skip
    prompts.write_bytes(b"\n".join([good[0], b"", *bad, good[1]]))
    assert run(model, prompts, tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert [record["line"] for record in found] == [1, *range(3, 11)]
    assert ["error" in record for record in found] == [False, *[True] * 7, False]
    err = capfd.readouterr().err
    for number, part in zip(
        range(3, 10),
        ["not JSON", "one of", "is empty", "must be a string", "context is 256", "role", "JSON"],
        strict=True,
    ):
        (line,) = (text for text in err.splitlines() if f"line {number}:" in text)
        assert part in line


def test_a_line_that_anything_breaks_down_over_is_its_own_error(
    model: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer over a text, or over the answer; the JSON parser; a pass; a missing row."""
    push = TextStream.push

    def panicking(self: Any, *arguments: Any, **options: Any) -> str:
        if self.bad:
            raise type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("at 4")
        return push(self, *arguments, **options)

    start = TextStream.__init__

    def noting(self: Any, tokenizer: Any, ids: Any, stops: Any, **options: Any) -> None:
        start(self, tokenizer, ids, stops, **options)
        self.bad = bytes(ids) == b"panic"

    monkeypatch.setattr(TextStream, "push", panicking)
    monkeypatch.setattr(TextStream, "__init__", noting)
    bad = [
        b'"half \\ud83d"', b"[" * 50_000, b'{"prompt": [257, 258]}', b'{"prompt": [-1]}', b"NaN",
        b'{"prompt": [1.5]}', b'{"messages": [5]}', b'"panic"', b'{"prompt": [[1], [2]]}',
        b"9" * 5000, b"\x00", b'{"prompt": 1e999}',
    ]  # fmt: skip
    good = b'"One"'
    prompts, lines = tmp_path / "in", [b"\xef\xbb\xbf" + good]
    for line in bad:
        lines += [line, good]
    prompts.write_bytes(b"\n".join(lines))
    assert run(model, prompts, tmp_path / "out", "--max-batch", "3") == 0
    found = results(tmp_path / "out")
    assert [record["line"] for record in found] == list(range(1, len(lines) + 1))
    assert ["error" in record for record in found] == [False, *[True, False] * len(bad)]
    assert len({record["text"] for record in found[::2]}) == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) == len(bad)


def test_what_ends_a_run_is_one_line_and_what_was_done_before_is_kept(
    model: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "in", ["One", "Two", "Three"])
    forward, passes = Runner.forward, []

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) > 7:
            raise ReadError("model.safetensors: layer 1: bytes 0 to 9: I/O error")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Runner, "forward", failing)
    assert run(model, prompts, tmp_path / "out", "--max-batch", "1") == 2
    assert [record["line"] for record in results(tmp_path / "out")] == [1]
    assert capfd.readouterr().err == "error: model.safetensors: layer 1: bytes 0 to 9: I/O error\n"


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_run_that_was_ended_is_resumed_after_its_last_whole_line(
    model: Path, tmp_path: Path, capfd: Any, cut: int
) -> None:
    prompts = write_prompts(tmp_path / "in", ["One", "Two", "", "Four", "Five"])
    output = tmp_path / "out"
    assert run(model, prompts, output) == 0
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    capfd.readouterr()
    assert run(model, prompts, output) == 0
    assert output.read_bytes() == whole
    assert "line 3" not in capfd.readouterr().err, "what was done is not done again"


@pytest.mark.parametrize("held", ["my thesis\n", "my thesis", '{"line": 1}\nmy thesis'])
def test_a_file_of_something_else_is_not_appended_to(
    model: Path, tmp_path: Path, capfd: Any, held: str
) -> None:
    prompts = write_prompts(tmp_path / "in", ["One"])
    (tmp_path / "out").write_text(held)
    assert run(model, prompts, tmp_path / "out") == 2
    assert (tmp_path / "out").read_text() == held
    assert "is no file of results" in capfd.readouterr().err


def test_without_an_output_file_the_lines_go_to_stdout(
    model: Path, tmp_path: Path, capfd: Any
) -> None:
    prompts = write_prompts(tmp_path / "in", ["One", "Two"])
    assert cli.main(["generate", str(model), "--prompts", str(prompts), *OPTIONS]) == 0
    assert [json.loads(line)["line"] for line in capfd.readouterr().out.splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "/nowhere"], "/nowhere"),
        (["--prompt", "Hi", "--output", "x"], "--output"),
        (["--prompt", "Hi", "--prompts", "x"], "not allowed with"),
        (["--prompt", "Hi", "--kv", "disk"], "kv='disk'"),
        (["--prompt", "Hi", "--top-p", "3"], "top_p=3.0"),
        (["--prompts", "x", "--max-length", "900"], "max_length=900"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    model: Path, capfd: Any, arguments: list[str], message: str
) -> None:
    assert cli.main(["generate", str(model), "--device", "cpu", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_the_plan_is_said_before_the_text(model: Path, capfd: Any) -> None:
    assert cli.main(["generate", str(model), "--prompt", "Hi", "--plan", *OPTIONS]) == 0
    assert "keys and values" in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_the_end_of_the_input_the_chat(model: Path) -> None:
    command = [
        sys.executable, "-u", "-m", "layer_streamer", "chat", str(model),
        "--device", "cpu", "--max-new-tokens", "200", "--temperature", "1", "--seed", "1",
    ]  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        assert process.stdout.read(2)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"Again\n")
        _, err = process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in err and err.count(b"(ended)") == 1
