"""Compare two checkouts over the same checkpoint, pass by pass, in one run.

    git worktree add OLD COMMIT
    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/compare.py OLD . /tmp/q7 OUT [--only NAME ...] [--turns N]

For each regime a process of each checkout holds a streamer, and they take turns at passes, the
first one changing from turn to turn, and are opened anew, in the other order, for the second half
of the turns; where passes read from disk, raw reads of the same bytes are measured before each
turn, and shares are of these. Appends a JSON line a regime to OUT, and prints a table: medians, and
the pairs' median with its least and greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

GIB = 1 << 30
REGIMES: dict[str, dict[str, Any]] = {
    "mapped": {},
    "arena": {"host_budget": "100GiB", "read_mode": "direct"},
    "device budget 1 GiB": {"device_budget": GIB},
    "device budget 4 GiB": {"device_budget": 4 * GIB},
    "page cache, ring": {"n_cpu_pinned": 0},
    "page cache, pools": {"n_cpu_pinned": 4, "read_threads": 16},
    "half the model in host memory": {"host_budget": "6.1GiB"},
    "cold": {"host_budget": "64MiB", "read_mode": "direct"},
    "cold, pools": {"n_cpu_pinned": 4, "read_mode": "direct"},
}
FROM_DISK = ("half the model in host memory", "cold", "cold, pools")
COLD = ("cold", "cold, pools")
END_SECONDS = 60


class Side:
    """The process of one checkout."""

    def __init__(self, tree: Path, regime: str, path: Path) -> None:
        known = os.environ.get("PYTHONPATH", "")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", regime, str(path)],
            env={**os.environ, "PYTHONPATH": f"{tree.resolve()}:{known}"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a checkout's process ended (what it says is above)")
        return json.loads(line)

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        finally:
            self._process.kill()


def serve(regime: str, path: Path) -> int:
    """One checkout's side: a streamer of the regime; does what lines on stdin say."""
    import torch

    from layer_streamer import LayerStreamer
    from layer_streamer.measuring.bench import discard_prefetched, settle
    from layer_streamer.measuring.limit_set import open_limits
    from layer_streamer.measuring.rawspeed import Load, synchronize

    answers, sys.stdout = sys.stdout, sys.stderr
    cold, load = regime in COLD, Load(1)

    def answer(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
    with ExitStack() as stack:
        streamer = stack.enter_context(LayerStreamer.from_checkpoint(path, **REGIMES[regime]))
        x = torch.zeros(1, device=streamer.device)

        def run() -> None:
            streamer.run_pass(x, load)
            for device in streamer.devices:
                synchronize(device)

        for _ in range(2):
            run()
        settle(streamer)
        limits = {}
        if regime in FROM_DISK:
            limits, _ = open_limits(streamer, load, stack, cold=cold)
        answer(str(streamer.plan))
        for line in sys.stdin:
            if line.strip() == "limit":
                reads = [limits[name]() for name in limits if name != "compute"]
                answer(max(reads, default=0.0))
                continue
            if cold:
                discard_prefetched(streamer)
            else:
                run()
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
            settle(streamer)
            answer(seconds)
    return 0


def compare(trees: dict[str, Path], regime: str, path: Path, turns: int) -> dict[str, Any]:
    """Seconds of each pass by checkout, and of the limits measured before each turn."""
    names = list(trees)
    found: dict[str, Any] = {"regime": regime}
    # The process that opens last finds other memory: each is that one for half of the turns.
    for opened, count in ((names, turns - turns // 2), (names[::-1], turns // 2)):
        if count:
            part = take_turns({name: trees[name] for name in opened}, regime, path, count)
            found["plans"] = part["plans"]
            found["limits"] = [*found.get("limits", ()), *part["limits"]]
            known = found.get("seconds", dict.fromkeys(names, ()))
            found["seconds"] = {name: [*known[name], *part["seconds"][name]] for name in names}
    return found


def take_turns(trees: dict[str, Path], regime: str, path: Path, turns: int) -> dict[str, Any]:
    """Open both, in their order, and let them."""
    sides: dict[str, Side] = {}
    try:
        plans = {}
        for name, tree in trees.items():
            sides[name] = Side(tree, regime, path)
            plans[name] = sides[name].answer()
        seconds: dict[str, list[float]] = {name: [] for name in trees}
        limits = []
        for turn in range(turns):
            if regime in FROM_DISK:
                limits.append(sides["old"].ask("limit"))
            for name in list(trees)[:: 1 if turn % 2 else -1]:
                seconds[name].append(sides[name].ask("pass"))
            print(turn, limits[-1:], *(each[-1] for each in seconds.values()), file=sys.stderr)
    finally:
        for side in sides.values():
            side.end()
    return {"seconds": seconds, "limits": limits, "plans": plans}


def describe(record: dict[str, Any]) -> str:
    """One row of the table."""
    old, new = record["seconds"]["old"], record["seconds"]["new"]
    pairs = sorted(a / b for a, b in zip(old, new, strict=True))
    row = (
        f"{record['regime']:<30} old {median(old):8.4f}  new {median(new):8.4f}  "
        f"old/new {median(pairs):.3f} [{pairs[0]:.3f} .. {pairs[-1]:.3f}]"
    )
    for name, times in record["seconds"].items() if record["limits"] else ():
        shares = [limit / t for limit, t in zip(record["limits"], times, strict=True)]
        row += f"  share {name} {median(shares):.3f}"
    return row


def main() -> int:
    """Compare, or serve one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], Path(sys.argv[3]))
    add("old", type=Path, metavar="OLD")
    add("new", type=Path, metavar="NEW")
    add("path", type=Path, metavar="CHECKPOINT")
    add("out", type=Path, metavar="OUT")
    add("--only", nargs="*", choices=list(REGIMES), metavar="NAME")
    add("--turns", type=int, default=9, metavar="N")
    args = parser.parse_args()
    trees = {"old": args.old, "new": args.new}
    for regime in args.only or REGIMES:
        record = compare(trees, regime, args.path, args.turns)
        print(describe(record), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
