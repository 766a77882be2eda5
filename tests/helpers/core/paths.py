"""Where things are in the repository."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests"
MAKE = ROOT / "examples" / "make"
CORE, ENGINE, TUNING = (TESTS / "helpers" / name for name in ("core", "engine", "tuning"))
PYTHONPATH = os.pathsep.join(map(str, (ROOT, MAKE, CORE, ENGINE, TUNING)))
"""What pytest puts on ``sys.path`` (pyproject.toml), for processes that tests start."""
