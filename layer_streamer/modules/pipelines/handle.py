"""What a pipeline has as ``.layer_streamer``: those of its components, and what is resident."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...planning.budget import format_bytes
from ...transport.stats import PassReport
from ..handle import ModulePlan, ModuleStreamer


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Where a pipeline's weights live. ``str()`` of it is a table for each sequence of blocks."""

    components: Mapping[str, ModulePlan]
    """Of each that streams, by name: "transformer"."""
    resident_nbytes: Mapping[str, int]
    """Of each other that is a module, by name: bytes on the first device."""
    reserve_nbytes: int
    """Bytes of the budget that are left to activations."""

    def __str__(self) -> str:
        lines = [f"{name}\n{plan}\n" for name, plan in self.components.items()]
        lines += [
            f"{name}: resident: {format_bytes(n)}" for name, n in self.resident_nbytes.items()
        ]
        if self.reserve_nbytes:
            left = format_bytes(self.reserve_nbytes)
            lines.append(f"left to activations: {left} (reserve_bytes)")
        return "\n".join(lines)


class PipelineStreamer:
    """Streams the large components of one pipeline. Closed when these go, if not before.

    Thread rules: one call of the pipeline at a time; ``close`` from any thread.
    """

    def __init__(
        self,
        components: Mapping[str, ModuleStreamer],
        resident_nbytes: Mapping[str, int],
        reserve_nbytes: int,
    ) -> None:
        self._components = dict(components)
        self._resident_nbytes = dict(resident_nbytes)
        self._reserve_nbytes = reserve_nbytes

    @property
    def components(self) -> Mapping[str, ModuleStreamer]:
        """By name, of each component that streams. Each is its module's ``.layer_streamer``."""
        return dict(self._components)

    @property
    def plan(self) -> PipelinePlan:
        """Where the weights live, how they are read, predicted seconds; also after close."""
        plans = {
            name: replace(streamer.plan, reserve_nbytes=0)
            for name, streamer in self._components.items()
        }
        return PipelinePlan(plans, dict(self._resident_nbytes), self._reserve_nbytes)

    @property
    def last_pass(self) -> dict[str, dict[str, PassReport]]:
        """By component and sequence, where the time of its last finished pass went.

        Waits until the device has done these passes.
        """
        return {name: streamer.last_pass for name, streamer in self._components.items()}

    @property
    def closed(self) -> bool:
        """True after ``close``. Thread rules: any thread."""
        return all(streamer.closed for streamer in self._components.values())

    def close(self) -> None:
        """Close that of each component: its blocks have no weights then. What is resident stays.

        Idempotent, any thread.
        """
        for streamer in self._components.values():
            streamer.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else ", ".join(self._components)
        return f"<PipelineStreamer ({state})>"
