"""Where everything of an engine is, and the bytes that it takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layer_streamer import Plan

from .plan_table import table


@dataclass(frozen=True, slots=True)
class HostChoice:
    """What the number of layers that are computed in host memory was chosen by, where an engine was
    to choose it."""

    idle: str = ""
    """Why there are none, and nothing had to be measured."""
    products: Mapping[str, float] = field(default_factory=dict)
    """By format, and what multiplies it, bytes a second on the processor beside copies."""
    links: float = 0.0
    """Bytes a second that all devices are sent meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Where everything is, and the bytes that it takes. ``str()`` of it is a table of all parts."""

    kv_tokens: int
    chunk: int
    """Tokens that go through a layer at a time."""
    host_layers: tuple[int, ...]
    """Layers whose keys and values are in host memory."""
    num_layers: int
    device: Mapping[str, int]
    """By part, bytes; "layers" is the least that the streamer needs. Of several devices, the first
    one's."""
    host: Mapping[str, int]
    device_budget: int | None
    """For all of ``device``, and of each further one; None: as needed."""
    host_budget: int | None
    named: bool
    """``device_budget`` is one that somebody asked for."""
    options: Mapping[str, Any]
    """What the streamer is to be opened with."""
    streamer: Plan
    """What the streamer then does with its part, as far as that is known before it is opened."""
    others: tuple[Mapping[str, int], ...] = ()
    """As ``device``, of the devices behind the first."""
    host_choice: HostChoice | None = None
    """None: nobody left it to the engine, or its device is the CPU."""

    @property
    def devices(self) -> tuple[Mapping[str, int], ...]:
        """By device, its parts: layer i is of the one at i modulo their number."""
        return (self.device, *self.others)

    @property
    def device_nbytes(self) -> int:
        """Of the device that takes the most."""
        return max(sum(parts.values()) for parts in self.devices)

    @property
    def captures(self) -> bool:
        """True: nothing streams, and passes that decode are captured in CUDA graphs."""
        return "captured passes" in self.device

    @property
    def captures_layers(self) -> bool:
        """True: something streams, and what layers compute in passes that decode is captured."""
        return "captured layers" in self.device

    @property
    def reserve_nbytes(self) -> int:
        """The engine's part of the first device's memory."""
        return self.reserves[0]

    @property
    def reserves(self) -> tuple[int, ...]:
        """The engine's part of the memory of each device."""
        return tuple(sum(parts.values()) - parts["layers"] for parts in self.devices)

    def __str__(self) -> str:
        return table(self)
