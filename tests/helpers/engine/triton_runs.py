"""Checks of kernels, each in a pytest of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreters import run_script
from paths import ENGINE, ROOT

PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
CHECKS = ENGINE / "kernels_against_torch.py"
EVERY_CASE = "EVERY_CASE"
INTERPRETED_HERE = os.environ.get("TRITON_INTERPRET") == "1"
FEW = INTERPRETED_HERE and EVERY_CASE not in os.environ
"""The interpreter takes a millisecond for a program: by default it gets few of the cases."""
of_many = pytest.mark.skipif(FEW, reason=f"one of many: with {EVERY_CASE}")
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_checks(environment: dict[str, str], *checks: Path) -> None:
    """In a process of its own: Triton reads its environment when it is imported."""
    options = ["-q", "-m", "", "-p", "no:cacheprovider"]
    options += ["--tb=short", "--maxfail=3"]  # what fails is often one cause, and is to be seen
    options += map(str, checks or [CHECKS])
    if environment["TRITON_INTERPRET"] == "1":
        done = run_script(PYTEST, *options, environment=environment)
    else:  # with all threads that there are, for what the CPU computes beside the GPU
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options], cwd=ROOT, env=os.environ | environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
