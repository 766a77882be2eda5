"""Checks of kernels, each in a pytest of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from paths import ENGINE, ROOT

CHECKS = ENGINE / "kernels_against_torch.py"


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_checks(environment: dict[str, str], checks: Path = CHECKS) -> None:
    """In a process of its own: Triton reads its environment when it is imported."""
    run_together([(environment, checks)])


def run_together(runs: Sequence[tuple[dict[str, str], Path]]) -> None:
    """Several such processes at a time."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--maxfail=3"]  # what fails is often one cause, and is to be seen
    with ExitStack() as stack:
        started = []
        for environment, checks in runs:
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(
                [*command, str(checks)], cwd=ROOT, env=os.environ | environment,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(child.wait)
            stack.callback(child.kill)
            started.append((child, output))
        for child, output in started:
            code = child.wait()
            output.seek(0)
            assert code == 0, output.read()[-5000:]
