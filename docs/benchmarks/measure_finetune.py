"""Measure steps of LoRA over streamed weights, beside what the hardware needs for them.

    python docs/benchmarks/measure_finetune.py DIR OUT [--only NAME ...] [--turns N]

Makes random checkpoints in DIR where they are not there yet: DIR/qwen2.5-7b in bfloat16 (15 GB) and
DIR/qwen2.5-32b-ct4 in 4 bit (20 GB). One row of 2,048 tokens, adapters of rank 16 on all linear
modules of blocks, gradient checkpointing, AdamW; each regime in a process of its own.

* ``resident``: the model whole on the device, in bfloat16 (that in 4 bit, unpacked): compute alone.
* ``streamed``: in a process whose torch may have 8 GiB. A turn is the limit of the link, one step
  that waits between its two ways, and two in a row timed. The limit of a step is the longer of the
  resident one's median and the link: the bytes that a forward and a backward copied, as they
  report, back to back from pinned memory. What lies in the slots at a turn is not copied, so less
  than twice what streams. The longer of the two on each way, added up, stands beside it.
* ``trainer``: the same through transformers' Trainer, as the command finetune has it.

Appends a JSON line a regime to OUT, and prints a row of it. Needs peft and accelerate. With
--device cpu, --shape, --layers and --tokens it runs anywhere, to be checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finetune_rows import GIB, describe, resident_of
from finetune_steps import STEPS, Steps, batch_of, settings_of
from watch import HostMemory

ROOT = Path(__file__).resolve().parents[2]
CAP = 8 * GIB
WARM = 2
PIECE = 64 << 20
"""Bytes of pinned memory that the limit is copied from."""
CASES: dict[str, dict[str, Any]] = {
    "7b": {"shape": "qwen2.5-7b", "format": None, "weights": 5 * GIB},
    "32b": {"shape": "qwen2.5-32b", "format": "ct4", "weights": int(2.25 * GIB)},
}
"""By name, what is made, and the ``device_budget`` of its weights: adapters, their optimizer and
activations have the rest of 8 GiB."""
REGIMES = ("resident", "streamed", "trainer")


def path_of(args: argparse.Namespace, case: str) -> Path:
    """Of a case's checkpoint."""
    shape, kind = args.shape or CASES[case]["shape"], CASES[case]["format"]
    folder: Path = args.dir / (f"{shape}-{kind}" if kind else shape)
    return folder


def make(args: argparse.Namespace, case: str) -> None:
    """A random checkpoint, unless it is there."""
    path = path_of(args, case)
    if path.exists():
        return
    args.dir.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "examples" / "make" / "make_checkpoint.py")
    shape, kind = args.shape or CASES[case]["shape"], CASES[case]["format"]
    command = [sys.executable, script, str(path), "--shape", shape]
    command += ["--format", kind] if kind else []
    command += ["--layers", str(args.layers)] if args.layers else []
    subprocess.run(command, stdout=sys.stderr, check=True)


def resident_model(args: argparse.Namespace, case: str) -> Any:
    """The case's shape in bfloat16, whole on the device, random."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path_of(args, case))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def streamed_model(args: argparse.Namespace, case: str) -> Any:
    """The case's checkpoint, streamed."""
    import layer_streamer as ls

    budget = CASES[case]["weights"] if args.weights is None else args.weights
    options: dict[str, Any] = {"n_gpu": 0} if args.device == "cpu" else {"device_budget": budget}
    return ls.stream(path_of(args, case), device=args.device, dtype=torch.bfloat16, **options)


def measure_resident(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Compute alone."""
    with HostMemory() as host:
        steps = Steps(resident_model(args, case), args.tokens, lambda: None)
        for _ in range(WARM):
            steps.step()
        return steps.turns(args.turns, lambda: 0.0, host)


def measure_streamed(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Steps over streamed weights."""
    from layer_streamer.devices.accelerator import open_devices
    from layer_streamer.measuring.probe_copy import RawCopies

    with HostMemory() as host:
        model = streamed_model(args, case)
        with closing(model.layer_streamer) as handle:
            ways: list[int] = []

            def look() -> None:
                found = [r.steps["copy"].bytes for r in handle.last_pass.values()
                         if "copy" in r.steps]  # fmt: skip
                ways.append(sum(found))

            steps = Steps(model, args.tokens, look)
            for _ in range(WARM):
                steps.step()
            steps.looked_at()
            look()
            plans = handle.plan.sequences.values()
            whole = sum(sum(plan.placement.copy_bytes) for plan in plans)
            on_gpu = args.device != "cpu"
            copies = RawCopies(open_devices(None), [sum(ways)], PIECE) if on_gpu else None
            with closing(copies) if copies is not None else nullcontext():
                times = steps.turns(args.turns, copies.seconds if copies else lambda: 0.0, host)
            reports = {name: str(report) for name, report in handle.last_pass.items()}
            bound = {name: report.bound_by for name, report in handle.last_pass.items()}
            plan = str(handle.plan)
    return times | {
        "ways": ways, "streams": whole, "plan": plan, "reports": reports, "bound": bound,
        "anonymous": host.anonymous, "taken": host.taken,
    }  # fmt: skip


def measure_trainer(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Steps of transformers' Trainer over streamed weights."""
    from layer_streamer.llm.finetuning import training
    from layer_streamer.llm.finetuning.samples import Sample
    from layer_streamer.llm.finetuning.watching import Watch

    model = streamed_model(args, case)
    with closing(model.layer_streamer) as handle:
        ids = batch_of(model, args.tokens)["input_ids"][0].tolist()
        settings = settings_of(STEPS * args.turns)
        watch = Watch(reports=lambda: handle.last_pass, tell=lambda *_: None)
        made = training.adapted(model, settings, "base")
        folder = args.dir / "trainer"
        arguments = training.arguments_for(model, settings, folder, looks=False)
        arguments.save_strategy = "no"
        samples = [Sample(ids, list(ids))] * len(range(settings.steps))
        training.train(made, arguments, 0, (samples, []), watch)
    return {"seconds": watch.seconds[1:], "losses": watch.losses, "says": watch.lines()}


MEASURES = dict(zip(REGIMES, (measure_resident, measure_streamed, measure_trainer), strict=True))


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One regime, in this process."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    case, _, regime = name.partition(" ")
    on_gpu = args.device != "cpu"
    if on_gpu and regime != "resident":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap / total)
    if not on_gpu:
        torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
    found = MEASURES[regime](args, case)
    peaks = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    peak, reserved = [look() if on_gpu else 0 for look in peaks]
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {
        "regime": name, "device": device, "tokens": args.tokens, "torch": torch.__version__,
        "peak": peak, "reserved": reserved, **found,
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    """What to measure, and how."""
    from layer_streamer import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    nbytes = partial(parse_bytes, "bytes")
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR")
    add("out", type=Path, metavar="OUT")
    names = [f"{case} {regime}" for case in CASES for regime in REGIMES]
    add("--only", nargs="*", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--turns", type=int, default=5, metavar="N")
    add("--tokens", type=int, default=2048, metavar="N")
    add("--cap", type=nbytes, default=CAP, metavar="BYTES", help="of torch's memory: 8 GiB")
    add("--weights", type=nbytes, metavar="BYTES", help="device_budget, in place of the case's")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--shape", metavar="SHAPE", help="in place of the case's")
    add("--layers", type=int, metavar="N", help="of it, in place of all")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.names = args.only or [name for name in names if name != "32b trainer"]
    return args


def main() -> int:
    """Measure the regimes, each in a process of its own; or, with --one, one of them here.

    Exit code 1 if one of them failed.
    """
    args = parse_args()
    if args.one is not None:
        record = measure(args, args.one)
        print(describe(record, resident_of(args.out, args.one)), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")
        return 0
    failed = False
    for name in args.names:
        make(args, name.partition(" ")[0])
        child = subprocess.run([sys.executable, *sys.argv, "--one", name], check=False)
        failed |= child.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
