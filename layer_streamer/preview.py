"""The plan of a checkpoint that is not opened, for engines that share out a budget themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from .assembly import draw_plan
from .checkpoint.formats import as_manifest
from .checkpoint.manifest import Manifest
from .devices.accelerator import open_devices
from .planning.options import Options, shows
from .planning.plan import Plan
from .planning.settings import Settings


@shows(Options)
def plan_checkpoint(path: str | Path | Manifest, **options: Unpack[Options]) -> Plan:
    """The plan that ``LayerStreamer.from_checkpoint(path, **options)`` would go by now.

    As there, an option that is None is at its default, and a pool of 0 is no such pool. Only
    headers are read, and nothing is allocated. Without budgets, its ``placement`` holds what the
    slots take, in bytes; ``machine`` says what is free. What is free may change until the streamer
    is opened. Errors: those of ``from_checkpoint``; TypeError for an option that it does not have.
    Thread rules: any thread.
    """
    settings = Settings(**options)
    manifest = as_manifest(path, settings.asked["layer_pattern"])
    return draw_plan(manifest, open_devices(settings.asked["device"]), settings, {})
