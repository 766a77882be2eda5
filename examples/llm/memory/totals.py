"""What a run of passes took: tokens, bytes, seconds and memory, and the lines that say so."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from layer_streamer import LayerStreamer

from ..drafts.drafted import Drafted
from ..request import Request

GIB = 2**30


@dataclass
class Totals:
    """Counters of one generated text; the first pass takes the prompt."""

    prompt_tokens: int
    new_tokens: int = 0
    passes: int = 0
    drafts: Mapping[str, Drafted] = field(default_factory=dict)
    """What came of drafts, by source."""
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    streamed_bytes: int = 0
    bound_by: Counter[str] = field(default_factory=Counter)
    """How many passes each step was the slowest of."""

    def add_pass(self, streamer: LayerStreamer, seconds: float, request: Request) -> None:
        """Count the streamer's last pass, which took ``seconds`` with all that belongs to it, and
        after which the text is the request's."""
        report = streamer.last_pass
        assert report is not None
        moved = [step.bytes for name, step in report.steps.items() if name != "compute"]
        self.streamed_bytes += max(moved, default=0)
        self.bound_by[report.bound_by] += 1
        if self.passes == 0:
            self.prompt_seconds = seconds
        else:
            self.decode_seconds += seconds
        self.passes += 1
        self.new_tokens = len(request.new_ids)
        self.drafts = request.drafts

    def summary(self, streamer: LayerStreamer) -> str:
        """Three lines for people, four where there were drafts."""
        speed = f"{self.new_tokens} tokens"
        if self.decode_seconds:
            speed += f" at {(self.new_tokens - 1) / self.decode_seconds:.1f} tokens/s"
        seconds = self.prompt_seconds + self.decode_seconds
        drafts = list[str]()
        if self.drafts:
            right = ", ".join(f"{name} {some}" for name, some in self.drafts.items())
            drafts.append(f"{self.new_tokens / self.passes:.1f} tokens a pass; right: {right}")
        return "\n".join(
            (
                f"{speed}, after a prompt of {self.prompt_tokens} in {self.prompt_seconds:.2f} s",
                *drafts,
                f"{self.passes} passes, {self._streamed(seconds)}, "
                f"bound by {self.bound_by.most_common(1)[0][0]}",
                _memory(streamer),
            )
        )

    def _streamed(self, seconds: float) -> str:
        if not self.streamed_bytes:
            return "nothing streamed (all layers stay in memory)"
        rate = self.streamed_bytes / seconds / 1e9
        return f"{self.streamed_bytes / 1e9:.2f} GB streamed at {rate:.2f} GB/s"


def _memory(streamer: LayerStreamer) -> str:
    memory = streamer.memory
    held = memory.host_bytes + memory.device_bytes - sum(memory.static_bytes.values())
    what = "slots" if set(streamer.plan.tiers) == {"disk"} else "slots and resident layers"
    line = (
        f"model {streamer.manifest.nbytes / GIB:.3f} GiB, {what} {held / GIB:.3f} GiB; "
        f"this process at its peak, Python and torch included: {peak_host_bytes() / GIB:.3f} GiB"
    )
    if streamer.device.type == "cuda":
        peaks = [torch.cuda.max_memory_allocated(device) for device in streamer.devices]
        each = ", ".join(f"{peak / GIB:.3f} GiB" for peak in peaks)
        line += f", on the GPU{'s' * (len(peaks) > 1)} {each}"
    return line


def peak_host_bytes() -> int:
    """Most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory from before the exec
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
