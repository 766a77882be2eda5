"""How many more objects there are after passes than before, by route: a process of its own.

    steady_state.py CHECKPOINT PASSES ROUTE...

What ran before in a process of many tests leaves work to Python and torch that is counted, too.
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

from fake_device import FakeDevice
from interrupter import LIBRARY
from routes import make_devices, nothing, open_route

LOOKS = 100
"""What is being read just now is gone sooner or later."""


def count_objects(device: Any) -> int:
    """Blocks that lines of the library have allocated since tracing began, and that are there."""
    if isinstance(device, FakeDevice):
        device.drain()  # what it has still to copy holds views
    gc.collect()  # empties Python's own lists of free objects, too
    only = (tracemalloc.Filter(True, f"{LIBRARY}/*"),)
    traces = tracemalloc.take_snapshot().filter_traces(only)
    return sum(stat.count for stat in traces.statistics("filename"))


def grown(path: Path, route: str, passes: int) -> int:
    """Objects more after ``passes`` passes."""
    device = make_devices(route)
    with open_route(route, path, device, read_chunk=4096) as streamer:
        pools = [pool for lane in streamer._parts.pipeline.lanes for pool in lane.memory.host_pools]
        tracemalloc.start()
        # Until each layer has been in each slot: what is viewed there is kept.
        for _ in range(2 * max((pool.count for pool in pools), default=12) + 2):
            streamer.run_pass(None, nothing)
        before = count_objects(device)
        for _ in range(passes):
            streamer.run_pass(None, nothing)
        least = min(count_objects(device) for _ in range(3))
        for _ in range(LOOKS):
            if least - before < passes:
                break
            least = count_objects(device)
        tracemalloc.stop()
        return least - before


if __name__ == "__main__":
    where, count, *names = sys.argv[1:]
    print(json.dumps({name: grown(Path(where), name, int(count)) for name in names}))
