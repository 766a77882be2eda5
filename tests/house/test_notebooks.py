"""Notebooks of examples/: they run from top to bottom, and hold nothing that was not written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import PYTHONPATH, ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


@each
def test_a_notebook_is_kept_without_what_it_printed(path: Path) -> None:
    assert json.loads(path.read_text())["nbformat"] == 4
    for cell in cells(path, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@each
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link


@pytest.mark.slow
@each
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    # As in a kernel: the main module is no file, which a process of its own could import.
    code = "\n\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    own = {"PYTHONPATH": PYTHONPATH, "MPLBACKEND": "agg"}
    own |= {name: str(tmp_path) for name in ("XDG_CACHE_HOME", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-"], input=code, cwd=tmp_path, env=os.environ | own,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
