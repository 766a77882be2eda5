"""Measure several tokens a pass on a GPU: drafts that really run, and are as right as real ones.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_speculation.py /tmp/q7 CASES OUT [--draft self] [--cap 8GiB]

Weights are random here, so a draft would be right by chance alone. CASES is a JSON document whose
"texts" say of a real model and a real draft, token by token, where the draft agreed ("own-int4-..."
and "draft-..."). The draft's passes are made inside the timed cycle, and only the ids that it
proposes are replaced: by the text's own where the real draft agreed, else by others. The model's
passes are real as well, but for one number added to each token's logits, which makes it choose the
text's. The draft's own account of how likely tokens are means nothing, so that nothing ends a draft
but what was measured.

Two processes whose GPU memory is capped: an engine with the draft, and one without, which keeps
more layers. Of the first the seconds of a pass that looks at 1 to 64 tokens, and for each text the
tokens a second with drafts and with none ("always": of a draft that is always right); of the second
those with none. Appends a JSON line each
to OUT, and prints rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_runs import Capped, machine, open_engine, prompt_of, wait

from layer_streamer import parse_bytes
from layer_streamer.llm.drafts.drafter import Drafter
from layer_streamer.llm.drafts.tree import Tree, as_tree
from layer_streamer.llm.engine import StreamingEngine

COUNTS = (1, 8, 16, 32, 64)
CONTEXT, NEW = 512, 96
AGREES = {"self": "own-int4-g64_agrees"}
MODEL_AGREES = "draft-0.5b_agrees"


class Scripted:
    """A drafter whose work is done and whose ids are replaced: chains of them alone."""

    weighs = False

    def __init__(self, real: Any, text: Sequence[int], agrees: str) -> None:
        self._real, self._text, self._agrees = real, text, agrees
        real._steps._goes_on = lambda *_: True
        self.lengths: list[int] = []

    def propose(self, key: int, ids: Sequence[int], most: int) -> Sequence[int]:
        done = len(ids) - CONTEXT
        count = len(as_tree(self._real.propose(key, ids, most)).trunk())
        self.lengths.append(count)
        right = zip(self._text[done : done + count], self._agrees[done:], strict=False)
        return [token if agrees == "1" else (token + 1) % 1000 for token, agrees in right]

    def accepted(self, key: int, proposed: int, agreed: int) -> None:
        self._real.accepted(key, proposed, agreed)

    def forget(self, key: int) -> None:
        self._real.forget(key)


class Led:
    """A runner's forward whose likeliest tokens are those of a text."""

    def __init__(self, engine: StreamingEngine, text: Sequence[int]) -> None:
        self._runner: Any = engine._runner
        self._forward = self._runner.forward
        self._text = torch.tensor(text, device=engine.streamer.device)

    def __enter__(self) -> None:
        self._runner.forward = self.forward

    def __exit__(self, *_: object) -> None:
        del self._runner.forward

    def forward(self, entries: Any, *, drafts: Sequence[Tree], **options: Any) -> torch.Tensor:
        ((row, ids),), (draft,) = entries, drafts
        count = 1 + len(draft)
        begin = row.length + len(ids) - count + 1 - CONTEXT
        logits = self._forward(entries, drafts=drafts, **options).clone()
        places = self._text[begin : begin + count]
        logits[torch.arange(len(places), device=places.device), places] += 1e4
        return logits


def timed(engine: StreamingEngine, drafting: Any, count: int) -> tuple[float, Any]:
    """Seconds a token beyond the first, and the completion."""
    engine.scheduler.drafting = drafting
    done = engine.generate(
        prompt_of(CONTEXT), max_new_tokens=count, temperature=0, return_details=True
    )
    return done.decode_seconds / (len(done.ids) - 1), done


def passes(engine: StreamingEngine, turns: int) -> dict[int, float]:
    """Median seconds of a pass over so many tokens behind the context."""
    runner = engine._runner
    row = runner.kv.rows.add(CONTEXT + max(COUNTS) + 1)
    assert row is not None
    runner.forward([(row, prompt_of(CONTEXT))])
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    for turn in range(turns + 1):
        for count in COUNTS:
            begin = time.perf_counter()
            ids = prompt_of(count)
            logits = runner.forward([(row, ids)], drafts=[Tree.chain(ids[1:])])
            logits[-1].argmax().item()
            if turn:
                found[count].append(time.perf_counter() - begin)
            runner.kv.rows.truncate(row, CONTEXT)
    runner.kv.rows.drop(row)
    return {count: median(seconds) for count, seconds in found.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One engine: the draft's, or that without one."""
    capped = Capped(parse_bytes("cap", args.cap), cuda=args.device != "cpu")
    draft = args.draft if args.child == "draft" else None
    options: dict[str, Any] = {
        "max_length": 2048, "max_batch": 1, "device_budget": capped.budget, "draft": draft,
    }  # fmt: skip
    texts = json.loads(args.cases.read_text())["texts"]
    begin = time.perf_counter()
    with open_engine(args.path, args.device, **options) as engine:
        opened, drafting = time.perf_counter() - begin, engine.scheduler.drafting
        wait(torch.device(args.device))
        timed(engine, None, 4)  # has kernels compiled
        plain, _ = timed(engine, None, 12)
        record = {"engine": args.child, "opened": opened, "plain": plain, "plan": str(engine.plan)}
        if drafting is not None and drafting._sources:
            record |= {"passes": passes(engine, args.turns), "texts": {}}
            _, done = timed(engine, None, NEW + 1)
            ((name, real),) = drafting._sources.items()
            key = AGREES.get(str(args.draft), MODEL_AGREES)
            always = one_text(engine, (name, real), done.ids, "1" * NEW)  # steps' time is known now
            record["texts"]["always"] = always
            for text in args.texts.split(","):
                record["texts"][text] = one_text(engine, (name, real), done.ids, texts[text][key])
    return record | capped.taken()


def one_text(
    engine: StreamingEngine, source: tuple[str, Drafter], ids: Sequence[int], agrees: str
) -> dict[str, Any]:
    """A text whose drafts are as right as the real one's were."""
    from layer_streamer.llm.drafts.drafting import Drafting
    from layer_streamer.llm.drafts.pace import Pace

    name, real = source
    script = Scripted(real, ids, agrees)
    pace: Pace = real._steps._pace  # type: ignore[attr-defined]
    rows = getattr(real, "_by_key", None)
    drafting = Drafting({name: script}, pace, rows)
    drafting._worths[name]._token_seconds = real._steps._seconds  # type: ignore[attr-defined]
    with Led(engine, ids):
        first, _ = timed(engine, drafting, len(agrees))  # finds out how long all of it takes
        seconds, done = timed(engine, drafting, len(agrees))
    return {
        "seconds": seconds,
        "first": first,
        "passes": done.passes,
        "drafted": done.drafted,
        "agreed": done.agreed,
        "lengths": script.lengths,
        "step": real._steps._seconds,  # type: ignore[attr-defined]
        "as_planned": list(done.ids) == list(ids[: len(done.ids)]),
    }


def describe(with_draft: dict[str, Any], without: dict[str, Any]) -> None:
    """Rows for people."""
    one = with_draft["passes"][1]
    for count, seconds in with_draft["passes"].items():
        print(f"{count:>3} tokens: {seconds / one:.3f} x one, {seconds:.4f} s a pass")
    print(f"without a draft {1 / without['plain']:.2f} tokens/s; with one kept off "
          f"{1 / with_draft['plain']:.2f}")  # fmt: skip
    for name, text in with_draft["texts"].items():
        rate = 1 / text["seconds"]
        print(
            f"{name:<8} {with_draft['plain'] * rate:.2f} x the same plan with drafting off, "
            f"{without['plain'] * rate:.2f} x an engine without a draft: {rate:.1f} tokens/s, "
            f"{text['passes']} passes, {text['agreed']} of {text['drafted']} drafted were right, "
            f"text as planned: {text['as_planned']}"
        )


def main() -> int:
    """Measure both engines, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="CHECKPOINT")
    add("cases", type=Path, metavar="CASES")
    add("out", type=Path, metavar="OUT")
    add("--draft", default="self", help="a model, or self")
    add("--cap", default="8GiB", help="GPU memory of the process")
    add("--texts", default="code,prose", metavar="NAME,NAME")
    add("--turns", type=int, default=7, metavar="N")
    add("--device", default="cuda")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(args)), flush=True)
        return 0
    found = {}
    for name in ("draft", "none"):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(result.stdout.splitlines()[-1])
        found[name]["passes"] = {int(n): s for n, s in found[name].get("passes", {}).items()}
        with open(args.out, "a") as file:
            file.write(
                json.dumps({**machine(args.path), "draft": args.draft, **found[name]}) + "\n"
            )
    describe(found["draft"], found["none"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
