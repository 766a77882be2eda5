"""What the Makefile passes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

PROMPTS = ["$(id) `id` \"double\" 'single' \\ ; true", "$5 for #1", "two\nlines", "${HOME}"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_demos_prompt_is_passed_on_as_it_was_typed(prompt: str, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / ".llm-installed").touch()
    for name, script in {"python": "echo model", "layer-streamer": "printf '%s|' \"$@\""}.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    command = ["make", "-s", "demo", f"VENV={tmp_path}", f"PROMPT={prompt}"]
    command += ["-o", str(tmp_path / ".llm-installed")]  # as if nothing were to be installed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"generate|model|--prompt|{prompt}|"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_tests_processes_keep_what_they_compile(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / ".dev-installed").touch()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    command = ["make", "-s", "test", f"VENV={tmp_path}", "-o", str(tmp_path / ".dev-installed")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert "PYTHONDONTWRITEBYTECODE=\n" in done.stdout
