"""What an engine's user asked of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KV_TIERS = ("auto", "device", "host")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user asked for; None: what suits."""

    kv: str = "auto"
    """Where keys and values live: "auto", "device" or "host"."""
    prefill_chunk: int | None = None
    device_budget: int | str | None = None
    host_budget: int | str | None = None
    reserve_bytes: int | str = 0
    """Of ``device_budget``, the caller's part."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The streamer's."""

    def __post_init__(self) -> None:
        if self.kv not in KV_TIERS:
            raise ValueError(f"kv={self.kv!r}: must be one of {', '.join(KV_TIERS)}")
