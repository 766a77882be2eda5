"""The child of a survey, which :mod:`.survey` starts.

JSON in: {"device", "path"}, to look at the machine, or {"engine", "model", "candidates"}, to ask an
engine for its plans; the last line of stdout is the answer, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from ..assembly import look_at_machine
from ..devices.accelerator import open_devices
from ..errors import StreamerError
from ..machine.identity import this_machine
from ..machine.limits import encode, load_limits
from ..planning.placement import Rates
from .trials.engine import plan_engines
from .trials.model_args import decode_model, encode_model


def look(device: Any, path: Path) -> dict[str, Any]:
    """Open the devices and describe the machine."""
    devices = open_devices(device)
    limits = load_limits(path)
    best = limits.best_read if limits is not None else None
    readers = {}
    if best is not None and best.mode == "direct":
        readers["direct"] = (best.threads, best.chunk_nbytes)
    machine = look_at_machine(devices, Rates(None, (None,) * len(devices)), readers)
    memory = psutil.Process().memory_info()
    return {
        "machine": {
            "devices": machine.devices,
            "unified": machine.unified,
            "maps_files": machine.maps_files,
            "device_free": machine.device_free,
            "host_available": machine.host_available,
            "readers": readers,
        },
        "identity": asdict(this_machine()),
        "limits": encode(limits) if limits is not None else None,
        # Libraries' files are page cache that any process may share.
        "baseline_bytes": max(memory.rss - getattr(memory, "shared", 0), 0),
    }


def plan(asked: Mapping[str, Any]) -> list[Any]:
    """By candidate, the streamer's options in the engine, or a line that refuses it."""
    answers = plan_engines(asked["engine"], decode_model(asked["model"]), asked["candidates"])
    return [answer if isinstance(answer, str) else encode_model(answer) for answer in answers]


def main() -> int:
    """Exit code 2 with one line on stderr if a device cannot be opened, or an engine not be had."""
    asked = json.load(sys.stdin)
    found: Any
    try:
        found = plan(asked) if "engine" in asked else look(asked["device"], Path(asked["path"]))
    except (StreamerError, ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 2
    print(json.dumps(found), flush=True)
    return 0
