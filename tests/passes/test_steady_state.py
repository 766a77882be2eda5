"""What passes take once the first few are over: no object more, whatever a layer is cut into."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice
from interrupter import LIBRARY
from routes import nothing, open_route, route_params

PASSES = 50
LOOKS = 100


def count_objects(device: Any) -> int:
    """Blocks that lines of the library have allocated since tracing began, and that are there."""
    if isinstance(device, FakeDevice):
        device.drain()  # what it has still to copy holds views
    gc.collect()  # empties Python's own lists of free objects, too
    only = (tracemalloc.Filter(True, f"{LIBRARY}/*"),)
    traces = tracemalloc.take_snapshot().filter_traces(only)
    return sum(stat.count for stat in traces.statistics("filename"))


@pytest.mark.parametrize("route", route_params("cpu pools", "cpu mapped", "pools", "ring"))
def test_passes_keep_no_object_more_however_many_jobs_their_reads_are(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    with open_route(route, tmp_path, device, read_chunk=4096) as streamer:
        pools = [pool for lane in streamer._parts.pipeline.lanes for pool in lane.memory.host_pools]
        tracemalloc.start()
        try:
            # Until each layer has been in each slot: what is viewed there is kept.
            for _ in range(2 * max(pool.count for pool in pools) + 2):
                streamer.run_pass(None, nothing)
            before = count_objects(device)
            for _ in range(PASSES):
                streamer.run_pass(None, nothing)
            # What is being read just now is gone sooner or later.
            assert any(count_objects(device) - before < PASSES for _ in range(LOOKS))
        finally:
            tracemalloc.stop()
