"""What is left of a trial when its parent is interrupted or killed: nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from paths import TUNING
from tuner_support import DEADLINE_SECONDS, Marked, checkpoint, marked, start_script, wait_until

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
        parent.wait(DEADLINE_SECONDS)
        wait_until(lambda: not marked.processes())


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
