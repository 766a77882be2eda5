"""What passes take once the first few are over: no object more, whatever a layer is cut into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import CORE, PYTHONPATH

PASSES = 50
ROUTES = ("cpu pools", "cpu mapped", "pools", "ring")


@pytest.mark.parametrize(
    "routes", [ROUTES[2:], pytest.param(ROUTES[:2], marks=pytest.mark.slow)], ids=" and ".join
)
def test_passes_keep_no_object_more_however_many_jobs_their_reads_are(
    tmp_path: Path, tensors: Any, routes: tuple[str, ...]
) -> None:
    command = [sys.executable, str(CORE / "steady_state.py"), str(tmp_path), str(PASSES), *routes]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert set(grown) == set(routes)
    assert max(grown.values()) < PASSES, grown
