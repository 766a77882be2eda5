"""Measure transformers' own decoding over streamed weights, beside the limit and beside others.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_modules.py /tmp/q7 OUT [--only NAME ...] [--turns N]

Greedy, one row, one token a forward, after a prompt of 16; each regime in a process of its own. A
turn is the limit, one token untimed, and four in a row timed. The limit is the streamed bytes over
the link, copied back to back from pinned memory. "cuDNN" leaves the choice of an attention to
torch, which takes cuDNN's on some devices and plans it anew for every length; the others have all
but that. Appends a JSON line a regime to OUT, and prints a row of it. Peers need their packages
(accelerate, airllm).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from watch import HostMemory

GIB = 1 << 30
PROMPT = 16
TOKENS = 4
OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PIECE = 64 << 20
"""Bytes of pinned memory that the limit is copied from, which count as the process's own."""
ALL = {"device_budget": "3.6GiB", "embeddings": "device"}
"""Room for three slots and what is outside the blocks, and for no block."""
STREAMED: dict[str, dict[str, Any]] = {
    "all blocks streamed": ALL,
    "all blocks streamed, cuDNN": ALL,
    "device_budget 2 GiB": {"device_budget": 2 * GIB},
    "device_budget 4 GiB": {"device_budget": 4 * GIB},
    "device_budget 8 GiB": {"device_budget": 8 * GIB},
    "device_budget 16 GiB": {"device_budget": 16 * GIB},
}
Measure = Callable[[Path, int], dict[str, Any]]


def decode(
    model: Any, turns: int, limit: Callable[[], float], host: HostMemory
) -> dict[str, list[float]]:
    """Seconds a token of each turn, and of the limit beside it."""
    host.rest()
    ids = torch.randint(10, 1000, (1, PROMPT), device="cuda")
    times: dict[str, list[float]] = {"seconds": [], "limit": []}
    cache = None

    def step() -> None:
        nonlocal ids, cache
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids = out.logits[:, -1:].argmax(-1)
        ids.tolist()  # as a loop does that looks for the end

    with torch.no_grad():
        step()
        for _ in range(turns):
            torch.cuda.synchronize()
            times["limit"].append(limit())
            step()
            begin = time.perf_counter()
            for _ in range(TOKENS):
                step()
            times["seconds"].append((time.perf_counter() - begin) / TOKENS)
            host.look()
    return times


def nothing() -> float:
    """The limit of what has none."""
    return 0.0


def measure_stream(path: Path, turns: int, options: dict[str, Any]) -> dict[str, Any]:
    """A streamed model."""
    import layer_streamer as ls
    from layer_streamer.devices.accelerator import open_devices
    from layer_streamer.measuring.probe_copy import RawCopies

    with HostMemory() as host:
        begin = time.perf_counter()
        model: Any = ls.stream(path, **options)
        opened = time.perf_counter() - begin
        with closing(model.layer_streamer) as handle:
            plans = handle.plan.sequences.values()
            moved = [sum(sum(plan.placement.copy_bytes) for plan in plans)]
            with closing(RawCopies(open_devices(None), moved, PIECE)) as copies:
                times = decode(model, turns, copies.seconds if sum(moved) else nothing, host)
            report = {"opened": opened, "moved": sum(moved), "plan": str(handle.plan), **times}
    return report | {"anonymous": host.anonymous, "taken": host.taken}


def measure_resident(path: Path, turns: int) -> dict[str, Any]:
    """transformers' own, all weights on the device."""
    import transformers

    with HostMemory() as host:
        begin = time.perf_counter()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        model.to("cuda").eval()
        opened = time.perf_counter() - begin
        times = decode(model, turns, nothing, host)
    return times | {"opened": opened, "anonymous": host.anonymous, "taken": host.taken}


def measure_accelerate(path: Path, turns: int) -> dict[str, Any]:
    """accelerate's cpu_offload, all weights in host memory."""
    import transformers
    from accelerate import cpu_offload

    with HostMemory() as host:
        begin = time.perf_counter()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        cpu_offload(model, execution_device=torch.device("cuda:0"))
        opened = time.perf_counter() - begin
        times = decode(model, turns, nothing, host)
    return times | {"opened": opened, "anonymous": host.anonymous, "taken": host.taken}


def measure_airllm(path: Path, turns: int) -> dict[str, Any]:
    """AirLLM, whose split copy of the model is in the page cache."""
    import airllm

    class WithoutTokenizer(airllm.AirLLMBaseModel):  # type: ignore[misc,unused-ignore]
        def get_tokenizer(self, hf_token: object = None) -> None:
            return None

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, HostMemory() as host:
        begin = time.perf_counter()
        model = WithoutTokenizer(str(path), layer_shards_saving_path=folder)
        opened = time.perf_counter() - begin
        times = decode(model, turns, nothing, host)
    return times | {"opened": opened, "anonymous": host.anonymous, "taken": host.taken}


PEERS: dict[str, Measure] = {
    "transformers, all on the device": measure_resident,
    "accelerate, cpu_offload": measure_accelerate,
    "AirLLM": measure_airllm,
}


def describe(record: dict[str, Any]) -> str:
    """One row."""
    seconds, limit = record["seconds"], median(record["limit"])
    row = f"{record['regime']:<32} {median(seconds):.4f} s a token"
    row += f" [{min(seconds):.4f} .. {max(seconds):.4f}]"
    if limit:
        ratio = median(a / b for a, b in zip(seconds, record["limit"], strict=True))
        row += f", {ratio:.3f} x the limit of {limit:.4f} s"
    row += f"; device peak {record['peak'] / GIB:.2f} GiB"
    if "opened" in record:
        row += f", opened in {record['opened']:.1f} s, anonymous {record['anonymous'] >> 20} MiB"
    return row


def start(path: Path) -> None:
    """Import what a model needs, and run one of a single layer: CUDA's libraries, and what they
    load with each kernel, take host memory."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("cuda"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
        out = model(torch.ones(1, PROMPT, dtype=torch.int64), use_cache=True)
        ids = out.logits[:, -1:].argmax(-1)
        model(ids, past_key_values=out.past_key_values, use_cache=True)
    del model, out
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(path: Path, regime: str, turns: int) -> dict[str, Any]:
    """One regime, in this process."""
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
    picked: AbstractContextManager[object] = sdpa_kernel(OTHERS)
    with nullcontext() if regime.endswith("cuDNN") else picked:
        start(path)
        if regime in PEERS:
            record = PEERS[regime](path, turns)
        else:
            record = measure_stream(path, turns, STREAMED[regime])
    peak = torch.cuda.max_memory_allocated()
    return {"regime": regime, "device": torch.cuda.get_device_name(), "peak": peak, **record}


def main() -> int:
    """Measure the regimes, each in a process of its own; or, with --one, one of them here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="CHECKPOINT")
    add("out", type=Path, metavar="OUT")
    add("--only", nargs="*", choices=[*STREAMED, *PEERS], metavar="NAME")
    add("--turns", type=int, default=7, metavar="N")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is None:
        for regime in args.only or [*STREAMED, *PEERS]:
            subprocess.run([sys.executable, *sys.argv, "--one", regime], check=False)
        return 0
    record = measure(args.path, args.one, args.turns)
    print(describe(record), flush=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
