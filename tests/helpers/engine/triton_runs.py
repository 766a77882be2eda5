"""Checks of kernels, each in a pytest of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from interpreters import run_script
from paths import ENGINE, ROOT

QUICK = """
import sys, pytest, triton_runs
triton_runs.quicken_interpreter()
sys.exit(pytest.main(sys.argv[1:]))
"""
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


def quicken_interpreter() -> None:
    """Triton's interpreter looks through its language at each call of a function by another, for
    what to replace in it: a third of all the time. Once in a launch is enough.
    """
    from triton.runtime import interpreter

    from layer_streamer.llm.kernels import fused

    fused.FEW_ROWS = 0  # all products of a tiny model would be interpreted: torch has them
    names = ("_patch_lang", "InterpretedFunction", "GridExecutor", "InterpreterError")
    if not all(hasattr(interpreter, name) for name in names):
        return  # another version: as slow as it is
    function, executor = interpreter.InterpretedFunction, interpreter.GridExecutor
    launch, replaced = executor.__call__, set[int]()
    languages = (interpreter.tl, interpreter.tl.core)

    @cache
    def seen_by(function: Any) -> set[int]:
        return set(map(id, languages)) & set(map(id, function.__globals__.values()))

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        own = seen_by(self.fn)
        if not own <= replaced:
            interpreter._patch_lang(self.fn)
            replaced.update(own)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def begin(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **options)

    function.__call__, executor.__call__ = call, begin


def run_checks(environment: dict[str, str], *checks: Path) -> None:
    """In a process of its own: Triton reads its environment when it is imported."""
    options = ["-q", "-m", "", "-p", "no:cacheprovider"]
    options += ["--tb=short", "--maxfail=3"]  # what fails is often one cause, and is to be seen
    options += map(str, checks or [CHECKS])
    if environment["TRITON_INTERPRET"] == "1":
        done = run_script(QUICK, *options, environment=environment)
    else:  # with all threads that there are, for what the CPU computes beside the GPU
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options], cwd=ROOT, env=os.environ | environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
