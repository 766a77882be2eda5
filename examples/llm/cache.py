"""Where the examples keep what they download or derive."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The user's cache directory for this project; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "layer-streamer"
