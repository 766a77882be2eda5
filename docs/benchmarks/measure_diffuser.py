"""Measure a diffusion transformer of two stacks, streamed, beside the limit and diffusers' own.

    python docs/benchmarks/measure_diffuser.py FOLDER OUT [--only NAME ...] [--turns N]

A transformer of Flux's shape and half of its blocks (random, 11.8 GB in bfloat16) is made in FOLDER
if it is not there. 4,096 image tokens, 512 of text; each regime in a process of its own. A turn is
the limit, one forward untimed, and three in a row timed. The limit is the longer of the streamed
bytes over the link and a forward with all weights resident, which is measured first. Appends a JSON
line a regime to OUT, and prints a row of it. Needs diffusers and accelerate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from watch import HostMemory

GIB = 1 << 30
FORWARDS = 3
SHAPE: dict[str, Any] = {
    "num_layers": 9,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
IMAGE_SIDE, TEXT = 64, 512
STREAMED: dict[str, dict[str, Any]] = {
    "stream, device_budget 8 GiB": {"device_budget": 8 * GIB},
    "stream, device_budget 4 GiB": {"device_budget": 4 * GIB},
}
RESIDENT = "diffusers, all on the device"


def make(folder: Path, shape: dict[str, Any]) -> None:
    """Write the random transformer."""
    import diffusers

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = diffusers.FluxTransformer2DModel(**shape).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="4GB")


def inputs_of(model: Any, side: int = IMAGE_SIDE, text: int = TEXT) -> dict[str, torch.Tensor]:
    """What one forward is given."""
    config = model.config
    some = {
        "hidden_states": (1, side * side, config.in_channels),
        "encoder_hidden_states": (1, text, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }
    found = {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) for n, s in some.items()}
    at = torch.arange(side, device="cuda")
    ids = torch.stack(torch.meshgrid(at * 0, at, at, indexing="ij"), -1)[0].reshape(-1, 3)
    return found | {
        "timestep": torch.ones(1, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.ones(1, device="cuda"),
        "img_ids": ids.float(),
        "txt_ids": torch.zeros(text, 3, device="cuda"),
    }


def denoise(model: Any, turns: int, limit: Callable[[], float], host: HostMemory) -> dict[str, Any]:
    """Seconds a forward of each turn, and of the limit beside it."""
    host.rest()
    times: dict[str, Any] = {"seconds": [], "limit": []}
    inputs = inputs_of(model)
    with torch.no_grad():
        out = model(**inputs).sample
        for _ in range(turns):
            torch.cuda.synchronize()
            times["limit"].append(limit())
            model(**inputs)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(FORWARDS):
                model(**inputs)
            torch.cuda.synchronize()
            times["seconds"].append((time.perf_counter() - begin) / FORWARDS)
            host.look()
    return times | {"finite": bool(out.isfinite().all())}


def nothing() -> float:
    """The limit of what has none."""
    return 0.0


def measure_stream(folder: Path, turns: int, options: dict[str, Any]) -> dict[str, Any]:
    """A streamed model."""
    import layer_streamer as ls
    from layer_streamer.devices.accelerator import open_devices
    from layer_streamer.measuring.probe_copy import RawCopies

    with HostMemory() as host:
        model: Any = ls.stream(folder, **options)
        with closing(model.layer_streamer) as handle:
            plans = handle.plan.sequences.values()
            moved = [sum(sum(plan.placement.copy_bytes) for plan in plans)]
            with closing(RawCopies(open_devices(None), moved, 64 << 20)) as copies:
                times = denoise(model, turns, copies.seconds if sum(moved) else nothing, host)
            times |= {"moved": sum(moved), "plan": str(handle.plan)}
    return times | {"anonymous": host.anonymous, "taken": host.taken}


def measure_diffusers(folder: Path, turns: int, level: str | None) -> dict[str, Any]:
    """diffusers' group offload of this level, or (None) all weights on the device."""
    import diffusers

    with HostMemory() as host:
        model = diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        if level is None:
            model.to("cuda")
        else:
            model.enable_group_offload(
                onload_device=torch.device("cuda"),
                offload_device=torch.device("cpu"),
                offload_type=level,
                num_blocks_per_group=1 if level == "block_level" else None,
                use_stream=True,
            )
        times = denoise(model.eval(), turns, nothing, host)
    return times | {"anonymous": host.anonymous, "taken": host.taken}


PEERS = {
    "diffusers, group offload of blocks": "block_level",
    "diffusers, group offload of leaves": "leaf_level",
}


def describe(record: dict[str, Any], compute: float) -> str:
    """One row. ``compute``: seconds of a forward with all weights resident; 0 if unknown."""
    seconds, link = record["seconds"], median(record["limit"])
    row = f"{record['regime']:<36} {median(seconds):.4f} s [{min(seconds):.4f} .. "
    row += f"{max(seconds):.4f}]"
    if link:
        limits = [max(each, compute) for each in record["limit"]]
        ratio = median(a / b for a, b in zip(seconds, limits, strict=True))
        row += f", {ratio:.3f} x the longer of link {link:.4f} and compute {compute:.4f} s"
    peaks = f"device peak {record['peak'] / GIB:.2f} GiB, host anonymous "
    peaks += f"{record['anonymous'] / GIB:.2f}, taken {record['taken'] / GIB:.2f} GiB"
    return f"{row}; {peaks}{'' if record['finite'] else '; NOT FINITE'}"


def start() -> None:
    """Import what a model needs, and run one of two blocks: CUDA's libraries, and what they load
    with each kernel, take host memory."""
    import diffusers

    with torch.device("cuda"), torch.no_grad():
        few = SHAPE | {"num_layers": 1, "num_single_layers": 1}
        model: Any = diffusers.FluxTransformer2DModel(**few).to(torch.bfloat16)
        model(**inputs_of(model))
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(folder: Path, regime: str, turns: int) -> dict[str, Any]:
    """One regime, in this process."""
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
    start()
    if regime in STREAMED:
        record = measure_stream(folder, turns, STREAMED[regime])
    else:
        record = measure_diffusers(folder, turns, PEERS.get(regime))
    peak = torch.cuda.max_memory_allocated()
    return {"regime": regime, "device": torch.cuda.get_device_name(), "peak": peak, **record}


def compute_of(out: Path) -> float:
    """Seconds of the last forward with all weights resident that OUT has."""
    records = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    found = [median(record["seconds"]) for record in records if record["regime"] == RESIDENT]
    return found[-1] if found else 0.0


def main() -> int:
    """Measure the regimes, each in a process of its own; or, with --one, one of them here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("out", type=Path, metavar="OUT")
    add("--only", nargs="*", choices=[RESIDENT, *STREAMED, *PEERS], metavar="NAME")
    add("--turns", type=int, default=5, metavar="N")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is None:
        if not (args.folder / "config.json").exists():
            make(args.folder, SHAPE)
        for regime in args.only or [RESIDENT, *STREAMED, *PEERS]:
            subprocess.run([sys.executable, *sys.argv, "--one", regime], check=False)
        return 0
    record = measure(args.folder, args.one, args.turns)
    print(describe(record, compute_of(args.out)), flush=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
