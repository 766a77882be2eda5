"""Trials for the tests: a tiny checkpoint, one call, and what is left of the processes after it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from checkpoints import tiny_checkpoint
from paths import PYTHONPATH

from layer_streamer.tuner.trials.model_args import encode_model
from layer_streamer.tuner.trials.record import TrialLimits, TrialRecord, TrialSpec
from layer_streamer.tuner.trials.setup_fn import name_function
from layer_streamer.tuner.trials.trial import run_trial

DEADLINE_SECONDS = 300.0
MARK = "LAYER_STREAMER_TEST"
LIMITS: dict[str, Any] = {"hang_seconds": 200.0, "trial_seconds": 300.0}


class Marked:
    """An environment variable by which every process of one test is found."""

    def __init__(self) -> None:
        self.value = uuid4().hex

    @property
    def environment(self) -> dict[str, str]:
        known = [path for path in [os.environ.get("PYTHONPATH")] if path]
        return {MARK: self.value, "PYTHONPATH": ":".join([PYTHONPATH, *known])}

    def processes(self) -> list[str]:
        """Command lines of what there is, zombies of our own included."""
        wanted = f"{MARK}={self.value}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
        zombies = [p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE]
        return found + [str(process) for process in zombies]


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    """Fails the test if a process that it started, or one that such a one started, is left."""
    mark = Marked()
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setenv(MARK, mark.value)
    monkeypatch.setenv(f"{MARK}_LOCK", str(lock))
    yield mark
    left = mark.processes()
    for line in left:
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
    assert not left
    with lock.open("rb") as file:
        # Refused while any process has it that inherited it.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_checkpoint(path)
    return path


def try_setup(
    path: Path, setup_fn: Callable[..., Any] | None, *, on_event: Any = None, **options: Any
) -> TrialRecord:
    """A trial of the checkpoint on the CPU. ``options``: of spec or limits, by their names."""
    limits = LIMITS | {k: options.pop(k) for k in list(options) if k in _names(TrialLimits)}
    spec: dict[str, Any] = {
        "model": encode_model({"path": path, "device": "cpu"}),
        "settings": {"n_gpu": 1},
        "setup_fn": None if setup_fn is None else name_function(setup_fn),
        "n_runs": 3,
    }
    return run_trial(TrialSpec(**spec | options), TrialLimits(**limits), on_event=on_event)


def _names(kind: Any) -> set[str]:
    return set(kind.__dataclass_fields__)


def run_script(script: Path, *arguments: object, mark: Marked, **options: Any) -> Any:
    """Run a script that tunes, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, (script, *arguments))],
        env=os.environ | mark.environment, capture_output=True, text=True,
        timeout=DEADLINE_SECONDS, check=False, **options,
    )  # fmt: skip


def start_script(script: Path, *arguments: object, mark: Marked) -> subprocess.Popen[str]:
    """Start a script that tunes and tells its progress on stdout."""
    return subprocess.Popen(
        [sys.executable, *map(str, (script, *arguments))],
        env=os.environ | mark.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again, and give up only long after it must have come true."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        os.sched_yield()
