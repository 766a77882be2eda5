"""Measure layer-streamer and others on the same checkpoint, one after the other, in one run.

    python docs/benchmarks/rivals.py CHECKPOINT [--peers NAME ...] [--device-memory 8GiB]

CHECKPOINT is a folder as transformers writes it, or a GGUF file. llama.cpp reads GGUF alone: of a
folder, one of the same weights is made (beside it, if --gguf names none). Each peer runs in a
process of its own, is ended after --limit seconds, and is left out, with a reason, where it is not
installed or cannot do this. With --sites FOLDER a peer's package is in FOLDER/PACKAGE, where
`pip install --target` put it; the one whose module has our name needs that. Files are read before
each peer, so that they are in the page cache. A turn is a prompt and tokens after it, greedily, one
row, the same ids for all; figures are those of the last turn.

Appends a JSON line a peer to --out, prints the table, and draws it as a picture (matplotlib). To
make both of these again, in this folder: python -m peers.table OUT PICTURE
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peers import registry
from peers.memory import DeviceWatch, HostWatch
from peers.registry import PEERS, Peer
from peers.session import Asked
from peers.table import draw, table

PIECE = 16 << 20
NO_MEMORY = ("OutOfMemoryError", "out of memory")
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def nbytes_of(text: str) -> int:
    """8GiB, 500MiB."""
    unit = text[-3:]
    if unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text}: a number and MiB or GiB")
    return int(float(text[:-3]) * UNITS[unit])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT")
    add("--peers", nargs="*", metavar="NAME", help=f"names or begins of them: {', '.join(PEERS)}")
    add("--device", default=None, help="default: cuda:0, or cpu where there is none")
    add("--device-memory", type=nbytes_of, metavar="SIZE", help="of the GPU, for each peer alike")
    add("--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp")
    add("--llama-bench", metavar="FILE", help="default: the one on PATH")
    add("--gpu-layers", type=int, metavar="N", help="of llama.cpp; default: what fits, by trying")
    add("--sites", type=Path, metavar="FOLDER", help="packages of peers are in FOLDER/PACKAGE")
    add("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (512)")
    add("--tokens", type=int, default=32, metavar="N", help="tokens after it (32)")
    add("--turns", type=int, default=2, metavar="N", help="the last one counts (2)")
    add("--seconds", type=float, default=90, help="for a peer's turns; it may be fewer tokens (90)")
    add("--limit", type=float, default=600, help="seconds until a peer is ended (600)")
    add("--threads", type=int, default=os.cpu_count(), help="of those that compute on a processor")
    add("--out", type=Path, default=Path("rivals.jsonl"), metavar="FILE")
    add("--picture", type=Path, metavar="FILE", help="default: OUT with .svg")
    add("--one", help=argparse.SUPPRESS)
    add("--answer", type=Path, help=argparse.SUPPRESS)
    return parser


def chosen(words: list[str] | None) -> list[str]:
    """The peers that these names mean; a begin of names means all that have it. ValueError if a
    word means none."""
    found: list[str] = []
    for word in words if words is not None else [""]:
        means = [word] if word in PEERS else [name for name in PEERS if name.startswith(word)]
        if not means:
            raise ValueError(f"--peers {word}: there are {', '.join(PEERS)}")
        found += [name for name in means if name not in found]
    return found


def warm(path: Path | None) -> None:
    """Read these files, so that the page cache has them."""
    files = sorted(path.rglob("*")) if path and path.is_dir() else [path] if path else []
    piece = bytearray(PIECE)
    for name in files:
        if name.is_file():
            with open(name, "rb", buffering=0) as file:
                while file.readinto(piece):
                    pass


def environment(name: str, sites: Path | None) -> dict[str, str]:
    """Of the peer's process: its own folder first, if it has one."""
    known = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    package = PEERS[name].package or name
    own = [str(sites.resolve() / package)] if sites and (sites / package).is_dir() else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([*own, *known])}


def run_one(name: str, asked: Asked, args: argparse.Namespace) -> dict[str, Any]:
    """One peer in a process of its own: its row."""
    with tempfile.TemporaryDirectory(prefix="rivals-", dir=args.checkpoint.parent) as work:
        answer = Path(work) / "answer.json"
        (Path(work) / "copy").mkdir()
        given = {**asdict(asked), "work": Path(work) / "copy"}
        answer.write_text(json.dumps(given, default=str))
        command = [sys.executable, str(Path(__file__).resolve()), str(args.checkpoint)]
        command += ["--one", name, "--answer", str(answer)]
        with DeviceWatch() as device:
            process = subprocess.Popen(
                command,
                env=environment(name, args.sites),
                start_new_session=True,
                stdout=sys.stderr,
            )
            with HostWatch(process.pid) as host:
                code = wait(process, args.limit)
        row = json.loads(answer.read_text()) if code == 0 else {"status": "failed"}
    if code is None:
        row["reason"] = f"not done within {args.limit:g} s"
    elif code != 0:
        row["reason"] = f"its process ended with {code}"
    seen = {"host_rss": host.rss, "host_own": host.own, "host_taken": host.taken}
    return row | seen | {"device_peak": device.nbytes if asked.cuda else None}


def wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Its exit code; None if it, and all that it started, had to be ended."""
    code: int | None = None
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code


def run_shares(name: str, peer: Peer, asked: Asked, args: argparse.Namespace) -> dict[str, Any]:
    """The same with smaller shares of the budget while memory runs out."""
    row: dict[str, Any] = {}
    for share in peer.shares if asked.device_nbytes else (1.0,):
        warm(args.checkpoint)
        warm(asked.gguf if "llama" in peer.opens else None)
        row = run_one(name, replace(asked, share=share), args) | {"share": share}
        if not any(text in row.get("reason", "") for text in NO_MEMORY):
            break
    return row


def one(name: str, answer: Path) -> int:
    """The peer's own process. An error becomes its row."""
    given = json.loads(answer.read_text())
    for key in ("checkpoint", "gguf", "work"):
        given[key] = Path(given[key]) if given[key] else None
    try:
        row = registry.measure(name, Asked(**given))
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split())[:200]
        row = {"status": "failed", "reason": f"{type(error).__name__}: {text}"}
    answer.write_text(json.dumps(row))
    sys.stdout.flush()
    os._exit(0)  # threads of a peer that hang must not keep its row


def gguf_of(args: argparse.Namespace, names: list[str]) -> Path | None:
    """The file for llama.cpp; of a folder it is made beside it if it is not there."""
    if args.gguf or args.checkpoint.is_file():
        return Path(args.gguf or args.checkpoint)
    if not any("llama_cpp" in PEERS[name].opens for name in names):
        return None
    out = args.checkpoint.resolve().with_name(f"{args.checkpoint.resolve().name}-bf16.gguf")
    if not out.exists():
        command = [sys.executable, "-m", "peers.to_gguf", str(args.checkpoint.resolve()), str(out)]
        done = subprocess.run(command, cwd=Path(__file__).parent, check=False)
        if done.returncode != 0:
            out.unlink(missing_ok=True)
            return None
    return out


def record(asked: Asked) -> dict[str, Any]:
    """What a row says of it: names of files without the folders of this machine."""
    found = asdict(asked)
    for key in ("work", "llama_bench", "share"):
        del found[key]
    names = {key: found[key].name for key in ("checkpoint", "gguf") if found[key]}
    return found | names


def main() -> int:
    """Measure the peers; or, with --one, one of them here."""
    parser = arguments()
    args = parser.parse_args()
    if args.one:
        return one(args.one, args.answer)
    from measure import describe_machine

    try:
        machine, names = describe_machine(), chosen(args.peers)
    except ValueError as error:
        parser.error(str(error))
    device = args.device or ("cuda:0" if machine["gpus"] else "cpu")
    keys = ("prompt", "tokens", "turns", "seconds", "threads", "gpu_layers", "llama_bench")
    asked = Asked(
        checkpoint=args.checkpoint.resolve(),
        gguf=gguf_of(args, names),
        work=args.checkpoint.parent,
        device=device,
        device_nbytes=args.device_memory if device != "cpu" else None,
        **{key: getattr(args, key) for key in keys},
    )
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = {
            "peer": name,
            "title": PEERS[name].title,
            **run_shares(name, PEERS[name], asked, args),
        }
        row |= {"capped": PEERS[name].capped, "asked": record(asked), "machine": machine}
        rows.append(row)
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(row.get("reason") or f"{row['seconds_per_pass']:.4f} s a token", file=sys.stderr)
    print(table(rows))
    with suppress(ImportError):
        draw(rows, args.picture or args.out.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
