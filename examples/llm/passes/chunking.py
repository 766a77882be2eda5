"""How the tokens of a pass are taken."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_CHUNK = 2048
"""Tokens that go through a layer at a time."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How the tokens of a pass are taken."""

    tokens: int = DEFAULT_CHUNK
    """At a time through a layer, which bounds its temporaries."""
    group_rows: bool = False
    """Attend to rows that decode together: for devices where a call costs more than its work."""
    captured_rows: int = 0
    """Up to so many rows that take one token go through ``decode``."""
    captured_part: int = 0
    """Tokens of prompts that go through a layer at a time beside captured rows, captured but for
    their attention; 0: as all others."""
    reproducible: bool = False
    """A token's result is the same bits, whatever shares its pass: no rows are grouped."""

    def __post_init__(self) -> None:
        if self.reproducible and self.captured_rows:
            raise ValueError("captured passes compute by few tokens: they are not reproducible")
