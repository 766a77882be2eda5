"""What passes take once the first few are over: no object more, whatever a layer is cut into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interpreters import run_script
from paths import CORE

PASSES = 30
ROUTES = ("cpu pools", "cpu mapped", "host images", "pools", "ring")


@pytest.mark.parametrize(
    "routes", [ROUTES[3:], pytest.param(ROUTES[:3], marks=pytest.mark.slow)], ids=" and ".join
)
def test_passes_keep_no_object_more_however_many_jobs_their_reads_are(
    tmp_path: Path, tensors: Any, routes: tuple[str, ...]
) -> None:
    done = run_script((CORE / "steady_state.py").read_text(), tmp_path, PASSES, *routes)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert set(grown) == set(routes)
    assert max(grown.values()) < PASSES, grown
