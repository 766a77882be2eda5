"""What is left of a trial when its parent is interrupted or killed: nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from paths import TUNING
from tuner_support import DEADLINE_SECONDS, Marked, checkpoint, marked, start_script

from layer_streamer.tuner.trials import process, supervisor
from layer_streamer.tuner.trials.process import end_marked

__all__ = ["checkpoint", "marked"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervised on Linux alone")
PARENT = TUNING / "tuner_parent.py"


def await_stage(parent: subprocess.Popen[str], stage: str) -> None:
    """Read what the parent says until a trial is at ``stage``."""
    assert parent.stdout is not None
    for line in parent.stdout:
        if line == f"{stage}\n":
            return
    raise AssertionError(f"it ended by itself: {parent.communicate()[1]}")


SLOW_START = pytest.param("start", marks=pytest.mark.slow)


@pytest.mark.parametrize("stage", [SLOW_START, "run 1"])
def test_a_parent_that_is_killed_leaves_no_child_behind(
    checkpoint: Path, marked: Marked, stage: str
) -> None:
    with start_script(PARENT, checkpoint, "starts_others_and_hangs", mark=marked) as parent:
        await_stage(parent, stage)
        parent.kill()
        # The end of what every process of a trial but the candidate's inherits, and the supervisor
        # keeps until the candidate has gone: a look alone can miss a process that is starting.
        parent.communicate(timeout=DEADLINE_SECONDS)
        assert not marked.processes()


def interrupted(parent: subprocess.Popen[str], marked: Marked) -> None:
    """It ends as a program does that Ctrl-C ends, and with it all that it started."""
    _, errors = parent.communicate(timeout=DEADLINE_SECONDS)
    assert parent.returncode in (130, -signal.SIGINT)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not marked.processes()


@pytest.mark.parametrize(
    "stage", [SLOW_START, pytest.param("import", marks=pytest.mark.slow), "run 1"]
)
def test_ctrl_c_in_a_stage_ends_the_trial_and_leaves_nothing(
    checkpoint: Path, marked: Marked, stage: str
) -> None:
    with start_script(PARENT, checkpoint, "starts_others_and_hangs", mark=marked) as parent:
        await_stage(parent, stage)
        parent.send_signal(signal.SIGINT)
        interrupted(parent, marked)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_ctrl_c_at_any_moment_ends_the_trial_and_leaves_nothing(
    checkpoint: Path, marked: Marked, number: int
) -> None:
    with start_script(PARENT, checkpoint, "starts_others", mark=marked) as parent:
        await_stage(parent, "start")
        moment = threading.Timer(random.uniform(0, 3), parent.send_signal, [signal.SIGINT])
        moment.start()
        interrupted(parent, marked)
        moment.join()


def test_a_supervisor_whose_parent_has_ended_already_starts_nothing(tmp_path: Path) -> None:
    started = tmp_path / "started"
    orders = {
        "command": [sys.executable, "-c", f"open({str(started)!r}, 'w')"],
        "parent": 1,  # as when the one that it was told of has ended
        "descriptors": [],
        "max_host_bytes": None,
    }
    command = [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(orders)]
    assert subprocess.run(command, stdin=subprocess.PIPE, check=False).returncode != 0
    assert not started.exists()


def test_a_process_that_is_not_ours_gets_no_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert supervisor._descends(other.pid)
        assert not supervisor._descends(os.getppid())
        assert not supervisor.refuses(os.getppid(), 0)
        end_marked("a mark that none has")
        assert other.poll() is None
        other.kill()


def test_an_id_that_another_process_has_got_meanwhile_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = b"MARK=1"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        monkeypatch.setattr(supervisor, "_parent", lambda pid: 1)
        supervisor.refuses(other.pid, signal.SIGKILL)
        supervisor.refuses(other.pid, signal.SIGKILL, partial(process._is_marked, wanted))
        assert other.poll() is None
        other.communicate(b"\n", DEADLINE_SECONDS)
        assert other.returncode == 0
