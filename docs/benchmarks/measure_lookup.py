"""Measure drafts by lookup: what they cost, and the tokens a pass that they alone would give.

    python docs/benchmarks/measure_lookup.py CASES MODEL [--tokens 1024,8192,32768]

CASES is a JSON document whose "texts" have a "prompt" and the "ids" of a model's greedy answer to
it; MODEL is that model's checkpoint, of which the tokenizer alone is used. No pass is computed: a
chain is proposed where the real text has got to, and as much of it as the text goes on with counts
as accepted, and one token more. The prompt's own pass gives the first token and is not counted.
Prints lines of JSON: for each count of tokens the microseconds of a proposal of 64 and of a token
that is added, of texts of three kinds (random: no matches; words: tokens as frequent as words are;
copy: random ones over and over), with the slowest of all; then for each text the tokens a pass by
the longest chain, each text alone, and behind the others, as in one engine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measure import describe_machine

from layer_streamer import read_manifest
from layer_streamer.llm.drafts.drafter import Drafter
from layer_streamer.llm.drafts.lookup import Lookup
from layer_streamer.llm.metadata import load_tokenizer, metadata_directory
from layer_streamer.llm.text.tokenizer import chat_ids

CHAINS = (8, 16, 64)
ADDED = 256
"""Tokens that are added one by one, each with a proposal behind it."""
VOCABULARY = 150_000


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", type=Path, metavar="CASES")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--tokens", default="1024,8192,32768", metavar="N,N")
    args = parser.parse_args()
    machine = describe_machine()
    for count in [int(n) for n in args.tokens.split(",")]:
        for kind, make in KINDS.items():
            found = seconds(make(count + ADDED), count)
            print(json.dumps({**machine, "tokens": count, "kind": kind, **found}), flush=True)
    directory = metadata_directory(read_manifest(args.model), print)
    tokenizer = load_tokenizer(directory)
    texts = json.loads(args.cases.read_text())["texts"]
    prompts = {name: chat_ids(tokenizer, text["prompt"]) for name, text in texts.items()}
    for most in CHAINS:
        engine = Lookup()
        for key, (name, text) in enumerate(texts.items()):
            assert len(prompts[name]) == text.get("prompt_tokens", len(prompts[name])), name
            alone = tokens_a_pass(Lookup(), key, prompts[name], text["ids"], most)
            behind = tokens_a_pass(engine, key, prompts[name], text["ids"], most)
            found = {"alone": alone, "behind_the_others": behind}
            print(json.dumps({"text": name, "chain": most, **found}), flush=True)


def copies(count: int) -> list[int]:
    """A text of 500 tokens over and over."""
    draw = random.Random(2)
    return [draw.randrange(VOCABULARY) for _ in range(500)] * (count // 500 + 1)


def words(count: int) -> list[int]:
    """The n-th most frequent token as frequent as the n-th most frequent word."""
    draw = random.Random(1)
    ranks = range(1, VOCABULARY)
    return draw.choices(ranks, weights=[1 / rank for rank in ranks], k=count)


def unlike(count: int) -> list[int]:
    """Tokens with hardly a match."""
    draw = random.Random(0)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


KINDS: dict[str, Callable[[int], list[int]]] = {"random": unlike, "words": words, "copy": copies}


def seconds(ids: Sequence[int], count: int) -> dict[str, float]:
    """Of the first ``count`` ids, and of ADDED more, each with a proposal of 64 behind it."""
    lookup, known = Lookup(), list(ids[:count])
    begin = time.perf_counter()
    lookup.propose(0, known, 0)
    first = time.perf_counter() - begin
    adding, proposing = [], []
    for token in ids[count : count + ADDED]:
        known.append(token)
        begin = time.perf_counter()
        lookup.propose(0, known, 0)
        middle = time.perf_counter()
        lookup.propose(0, known, 64)
        adding.append(middle - begin)
        proposing.append(time.perf_counter() - middle)
    return {
        "propose_us": median(proposing) * 1e6,
        "propose_us_at_most": max(proposing) * 1e6,
        "add_us": median(adding) * 1e6,
        "prompt_us_a_token": first / count * 1e6,
    }


def tokens_a_pass(
    drafter: Drafter, key: int, prompt: Sequence[int], text: Sequence[int], most: int
) -> float:
    """Of a text behind its first token, which the prompt's pass gives."""
    ids, known, passes = [*prompt, text[0]], 1, 0
    while known < len(text):
        chain = drafter.propose(key, ids, min(most, len(text) - known - 1))
        agreed = count_agreed(chain, text[known:])
        drafter.accepted(key, len(chain), agreed)
        ids += text[known : known + agreed + 1]
        known, passes = known + agreed + 1, passes + 1
    drafter.propose(key, ids, 0)
    drafter.forget(key)
    return (len(text) - 1) / passes


def count_agreed(chain: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens at the beginning are equal."""
    pairs: Any = enumerate(zip(chain, text, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chain), len(text)))


if __name__ == "__main__":
    sys.exit(main())
