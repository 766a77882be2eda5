"""What tests of rows that fail, and of rows beside them, share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layer_streamer import StreamerError
from layer_streamer.llm.engine import StreamingEngine

PROMPTS = [[7, 8, 9], [20, 21], [30] * 12, [40, 41, 42, 43]]


def make_engine(path: Path, **options: Any) -> StreamingEngine:
    """A small one, on the CPU."""
    return StreamingEngine(
        path, **({"device": "cpu", "max_length": 64, "kv_tokens": 512} | options)
    )


def drafts_always(engine: StreamingEngine) -> StreamingEngine:
    """The engine, which now drafts as far as there is room, whatever that takes: what is measured
    on a busy machine decides nothing."""
    assert engine._drafting is not None
    engine._drafting._pace = None
    return engine


def message(error: BaseException | None) -> str:
    """An error's one line."""
    assert isinstance(error, ValueError | StreamerError | OSError) and "\n" not in str(error)
    return str(error)
