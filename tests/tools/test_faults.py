"""What goes wrong in a command is one line that names the file, or the limit that was met."""

from __future__ import annotations

import errno
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from interpreters import COMMAND, run_script

from layer_streamer import ConfigError
from layer_streamer.tools import inspect_command
from layer_streamer.tools.cli import COMMANDS, main
from layer_streamer.tools.faults import one_line

FULL = "No space left on device"
ERRORS = [
    (OSError(errno.ENOSPC, FULL, "a/b"), f"a/b: {FULL}"),
    (OSError(errno.ENOSPC, FULL, b"a\xff"), f"a\\udcff: {FULL}"),
    (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a -> b: Invalid link"),
    (PermissionError(errno.EACCES, "denied", "x\x1b[31m"), "x\\x1b[31m: denied"),
    (OSError("plain"), "plain"),
    (MemoryError(), "out of host memory"),
    (RuntimeError("can't start new thread"), "can't start new thread"),
    (RuntimeError("[enforce fail]\n  DefaultCPUAllocator: can't allocate memory"),
     "[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    (ConfigError("n_gpu=-1: must be at least 0"), "n_gpu=-1: must be at least 0"),
    (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "'utf-8' codec can't"),
    (ValueError(), "ValueError"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "said"), ERRORS)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_is_one_line_whatever_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, error: Exception, said: str
) -> None:
    def run(args: object) -> None:
        raise error

    monkeypatch.setattr(f"layer_streamer.tools.{name}_command.run", run)
    model = {"doctor": [], "probe": [], "kernels": []}.get(name, ["MODEL"])
    if name == "generate":
        model = ["MODEL", "--prompt", "a"]
    if name == "quantize":
        model = ["MODEL", "OUTPUT", "--bits", "4"]
    if name in ("batch", "finetune"):
        model = ["MODEL", "IN", "OUT"]
    if name == "experts":
        model = ["TRACE", "--slots", "3"]
    assert main([name, *model]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1


@given(st.text(), st.sampled_from([OSError, ValueError, RuntimeError, MemoryError]))
def test_no_name_reaches_the_terminal_as_anything_but_text(text: str, kind: Any) -> None:
    line = one_line(kind(text))
    assert line.isprintable()
    line.encode()
    assert one_line(OSError(errno.EIO, "Input/output error", text)).isprintable()


@pytest.mark.parametrize(
    ("error", "name", "said"),
    [
        (RuntimeError("can't start new thread"), "RLIMIT_NPROC", "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "RLIMIT_NPROC", "-u"),
        (MemoryError(), "RLIMIT_AS", "ulimit -v"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "RLIMIT_AS", "ulimit -v"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "RLIMIT_AS", "ulimit -v"),
        (OSError(errno.EMFILE, "Too many open files", "f"), "RLIMIT_NOFILE", "ulimit -n"),
        (OSError(errno.EFBIG, "File too large", "f"), "RLIMIT_FSIZE", "ulimit -f"),
    ],
)
def test_the_limit_that_was_met_is_named_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, name: str, said: str
) -> None:
    asked = getattr(resource, name)

    def limited(kind: int) -> tuple[int, int]:
        return (4096, 4096) if kind == asked else (resource.RLIM_INFINITY,) * 2

    monkeypatch.setattr(resource, "getrlimit", limited)
    assert said in one_line(error)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert "ulimit" not in one_line(error)


def test_a_stdout_that_is_full_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with open("/dev/full", "w") as full:
        done = run_script(COMMAND, "inspect", tmp_path, stdout=full)
    assert (done.returncode, done.stderr) == (2, f"error: {FULL}\n")


def test_a_stderr_that_nobody_reads_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tiny_checkpoint(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", str(tmp_path)]) == 0
    monkeypatch.setattr(inspect_command, "run", lambda args: (_ for _ in ()).throw(ValueError("x")))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "x" not in capsys.readouterr().out.splitlines()
