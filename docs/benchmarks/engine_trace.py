"""Where the time of decode passes goes, by torch's profiler, as text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from layer_streamer.llm.engine import StreamingEngine

WARM_EVENTS = 3
NAME_WIDTH = 60


def trace(engine: StreamingEngine, prompt: Sequence[int], passes: int, rows: int) -> str:
    """Tables of so many rows by CPU and by device time, and how often the runtime was called.

    The profiler makes launches slower: what a pass takes without it is measured elsewhere.
    """
    cuda = engine.streamer.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    events = iter(engine.events([prompt], max_new_tokens=passes + WARM_EVENTS + 1, temperature=0))
    for _ in range(WARM_EVENTS):
        next(events)
    with profile(activities=kinds) as profiler:
        began = time.perf_counter()
        for _ in range(passes):
            next(events)
        seconds = time.perf_counter() - began
    averages: Any = profiler.key_averages()
    for _ in events:
        pass
    busy = sum(row.self_device_time_total for row in averages if _on_device(row)) / 1e6
    lines = [
        f"{passes} decode passes, a pass: {seconds / passes * 1e3:.2f} ms under the profiler, "
        f"the device busy for {busy / passes * 1e3:.2f} ms",
        "",
        "calls of the runtime a pass:",
    ]
    calls = [row for row in averages if row.key.startswith("cu") and not _on_device(row)]
    for row in sorted(calls, key=lambda row: -row.count):
        each = row.self_cpu_time_total / row.count
        lines.append(f"  {row.count / passes:8.1f}  {row.key} ({each:.1f} us each)")
    for order in ("self_cpu_time_total", *(["self_cuda_time_total"] if cuda else [])):
        table = averages.table(sort_by=order, row_limit=rows, max_name_column_width=NAME_WIDTH)
        lines += ["", f"by {order}:", table]
    return "\n".join(lines) + "\n"


def _on_device(row: Any) -> bool:
    return str(row.device_type).endswith("CUDA")
