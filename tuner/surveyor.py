"""``python -m layer_streamer.tuner.surveyor``: the child of a survey.

JSON in: {"device", "path"}; the last line of stdout is the JSON that survey.parse() reads.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from ..assembly import look_at_machine
from ..devices.accelerator import open_devices
from ..errors import ConfigError, StreamerError
from ..machine.identity import this_machine
from ..machine.limits import encode, load_limits
from ..planning.placement import Rates


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


def main() -> int:
    """Exit code 2 with one line on stderr if a device cannot be opened."""
    asked = json.load(sys.stdin)
    try:
        found = look(asked["device"], Path(asked["path"]))
    except (ConfigError, StreamerError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
