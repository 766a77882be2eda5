"""Measure how many tokens a pass a draft gives, on texts that its target has written.

    python docs/benchmarks/measure_drafts.py CASES TARGET DRAFT [DRAFT ...] [--chains 2,4,8,16,32]

CASES is a JSON document whose "texts" have a "prompt" and the "ids" of TARGET's greedy answer to
it, as drafts.json here has; TARGET and each DRAFT are checkpoints that the engine of examples/llm
opens, with one tokenizer. Every model reads each prompt and its text in one pass, in float32, so
that the token that it finds likeliest is known at each place: TARGET's have to be the text itself.
A draft then proposes a chain of at most k tokens where the text has got to. Those up to the first
that the text does not go on with are accepted, and the pass gives one token more. The first chain
begins the text: the draft has read the prompt by then. With others beside it, at each of its
places the OTHERS next likeliest tokens are proposed, too, one of which the text may go on with.

Prints lines of JSON: for each text how many of its tokens TARGET finds likeliest, and the least
distance between TARGET's two largest logits: if that is near zero, another order of adding gives
another text. Then for each draft and text where they agree, and the tokens a pass by the longest
chain. The last lines are those of all texts together: tokens over passes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine

from layer_streamer import LayerStreamer
from layer_streamer.llm.memory.wishes import Wishes
from layer_streamer.llm.opening import Limits, Model, open_runner, place, plan_memory
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.text.tokenizer import chat_ids

OTHERS = 3
"""Tokens beside each of a chain, as the engine drafts them."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a target has answered; both in token ids."""

    prompt: list[int]
    ids: list[int]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", type=Path, metavar="CASES")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("drafts", type=Path, nargs="+", metavar="DRAFT")
    parser.add_argument("--chains", default="2,4,8,16,32", metavar="K,K")
    args = parser.parse_args()
    chains = [int(k) for k in args.chains.split(",")]
    print(json.dumps(describe_machine()), flush=True)
    target = Model.read(args.target, tell)
    texts = read_texts(args.cases, target.tokenizer)
    for name, logits_TV in read_all(target, texts):
        found = {"target": args.target.name, "text": name, **check_text(texts[name], logits_TV)}
        print(json.dumps(found), flush=True)
    for path in args.drafts:
        draft, agreed = Model.read(path, tell), {}
        for name, logits_TV in read_all(draft, texts):
            agreed[name] = ranks = find_ranks(texts[name], logits_TV)
            bits = "".join("01"[rank == 0] for rank in ranks)
            found = {"draft": path.name, "text": name, **describe([ranks], chains)}
            print(json.dumps({**found, "agrees": bits}), flush=True)
        found = {"draft": path.name, "text": "all", **describe(list(agreed.values()), chains)}
        print(json.dumps(found), flush=True)


def tell(note: str) -> None:
    """What a checkpoint has that is not as expected."""
    print(note, file=sys.stderr)


def read_texts(cases: Path, tokenizer: Any) -> dict[str, Text]:
    """The texts by name; ValueError if the prompts' tokens are not as many as the cases say."""
    found = {}
    for name, case in json.loads(cases.read_text(encoding="utf-8"))["texts"].items():
        found[name] = Text(chat_ids(tokenizer, case["prompt"]), case["ids"])
        count, said = len(found[name].prompt), case.get("prompt_tokens")
        if said not in (None, count):
            raise ValueError(f"{name}: the prompt has {count} tokens, not {said}")
    return found


def read_all(model: Model, texts: Mapping[str, Text]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each text's name, and the logits (tokens of the text, vocabulary) of what the model finds at
    each of its tokens' places. One pass a text."""
    most = max(len(text.prompt) + len(text.ids) for text in texts.values())
    with opened(model, most) as runner:
        for name, text in texts.items():
            row = runner.kv.rows.add(most)
            assert row is not None  # the one before has been dropped
            ids = [*text.prompt, *text.ids[:-1]]
            yield name, runner.forward([(row, ids)], every_position=True)[len(text.prompt) - 1 :]
            runner.kv.rows.drop(row)


@contextmanager
def opened(model: Model, most: int) -> Iterator[Runner]:
    """What computes a model's passes in float32, for one row of ``most`` tokens."""
    options, dtype = place(model, None, torch.float32, {})
    limits = Limits(max_length=most, max_batch=1)
    runner = open_runner(model, *plan_memory(model, limits, Wishes(options=options), dtype))
    assert isinstance(runner.streamer, LayerStreamer)
    try:
        yield runner
    finally:
        runner.streamer.close()
        runner.close()
        runner.kv.close()


def check_text(text: Text, logits_TV: torch.Tensor) -> dict[str, Any]:
    """Whether the target would have written a text, and how sure that is."""
    largest = logits_TV.topk(2).values
    ranks = find_ranks(text, logits_TV)
    return {
        "prompt_tokens": len(text.prompt),
        "tokens": len(ranks),
        "likeliest": ranks.count(0),
        "least_margin": round(float((largest[:, 0] - largest[:, 1]).min()), 4),
    }


def find_ranks(text: Text, logits_TV: torch.Tensor) -> list[int]:
    """At each place of a text, how many tokens are likelier than its own, up to OTHERS and one."""
    likeliest = logits_TV.topk(1 + OTHERS).indices.cpu()
    return [
        row.index(token) if token in row else 1 + OTHERS
        for row, token in zip(likeliest.tolist(), text.ids, strict=True)
    ]


def describe(texts: Sequence[Sequence[int]], chains: Sequence[int]) -> dict[str, Any]:
    """How often a draft agrees with some texts, and the tokens a pass by the longest chain."""
    tokens = sum(map(len, texts))

    def by_chain(others: int) -> dict[str, float]:
        passes = {k: sum(count_passes(ranks, k, others) for ranks in texts) for k in chains}
        return {str(k): round(tokens / count, 3) for k, count in passes.items()}

    return {
        "tokens": tokens,
        "agreement": round(sum(ranks.count(0) for ranks in texts) / tokens, 4),
        "tokens_a_pass": by_chain(0),
        "with_others_beside": by_chain(OTHERS),
    }


def count_passes(ranks: Sequence[int], most: int, others: int = 0) -> int:
    """Passes that a text takes where a draft proposes ``most`` tokens each time, and so many others
    beside each of them."""
    known = passes = 0
    while known < len(ranks):
        chain = ranks[known : known + most]
        agreed = next((i for i, rank in enumerate(chain) if rank), len(chain))
        known += agreed + 1 + (agreed < len(chain) and chain[agreed] <= others)
        passes += 1
    return passes


if __name__ == "__main__":
    main()
