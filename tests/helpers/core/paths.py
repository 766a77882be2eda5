"""Where things are in the repository."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests"
MAKE = ROOT / "examples" / "make"
HELPERS = ("core", "engine", "tuning", "experts")
CORE, ENGINE, TUNING, EXPERTS = (TESTS / "helpers" / name for name in HELPERS)
PYTHONPATH = os.pathsep.join(map(str, (ROOT, MAKE, CORE, ENGINE, TUNING, EXPERTS)))
"""What pytest puts on ``sys.path`` (pyproject.toml), for processes that tests start."""
