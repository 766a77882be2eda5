"""Measure trees of a draft beside its chains, in tokens a pass, on texts that its target wrote.

    python docs/benchmarks/measure_trees.py CASES DRAFT [--nodes 8,16,32,64]

CASES is as for measure_drafts.py; DRAFT is a GGUF file or a directory, which transformers computes
in float32 here: it takes a mask of any shape. From every place of a text the likeliest nodes are
found, best first: a node's probability is that of its path by the draft's softmax, and every node
that is expanded is really computed and sees its own path alone. A branch that leaves the text after
b of its tokens is the same from every place before b: it is computed once for many.

A tree of n nodes gives as many tokens as it has nodes on the text, and one more; so does a chain,
the likeliest token of each step. Both begin anew where the text has got to then. Stopped at p, they
leave out what is less probable. Prints lines of JSON: for each text the tokens, the nodes and the
steps a pass (a draft computes a level of a tree in one step); the last line is of all texts.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine
from measure_drafts import Text, read_texts, tell
from transformers import AutoModelForCausalLM, DynamicCache

from layer_streamer.llm.opening import Model

BLOCK = 24
"""Places of a text from which trees grow together."""
WIDTH = 8
"""Nodes of a tree that are computed at a time."""
STOPS = (0.1, 0.05, 0.01)

Branch = tuple[int, tuple[int, ...]]
"""How many tokens of the text, and the tokens that leave it there; none: a node on the text."""


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """Of a tree that grows from a place of a text."""

    logp: float
    """Of its path."""
    on_text: int
    """Tokens of its path that are the text's."""
    off_text: tuple[int, ...]

    @property
    def depth(self) -> int:
        return self.on_text + len(self.off_text)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", type=Path, metavar="CASES")
    parser.add_argument("draft", type=Path, metavar="DRAFT")
    parser.add_argument("--nodes", default="8,16,32,64", metavar="N,N")
    args = parser.parse_args()
    nodes = [int(n) for n in args.nodes.split(",")]
    texts = read_texts(args.cases, Model.read(args.draft, tell).tokenizer)
    print(json.dumps(describe_machine()), flush=True)
    model, walks = load(args.draft), []
    for name, text in texts.items():
        with torch.inference_mode():
            walks.append(walk_all(Branches(model, text, max(nodes)), nodes))
        found = {"draft": args.draft.name, "text": name, **describe(walks[-1:])}
        print(json.dumps(found), flush=True)
    print(json.dumps({"draft": args.draft.name, "text": "all", **describe(walks)}), flush=True)


def load(path: Path) -> Any:
    """transformers' model in float32."""
    named = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    loaded: Any = AutoModelForCausalLM.from_pretrained(named[0], dtype=torch.float32, **named[1])
    return loaded.eval()


class Branches:
    """What a draft expects behind each beginning of a text, and behind branches off it."""

    def __init__(self, model: Any, text: Text, most: int) -> None:
        """Of each distribution the ``most`` likeliest tokens are kept."""
        self.text, self.most = text, most
        self._model, self._cache = model, DynamicCache()
        first = len(text.prompt) - 1
        ids = torch.tensor([[*text.prompt, *text.ids]])
        logps_TV = self._compute(input_ids=ids)[first:]
        self._on_text = list(self._likeliest(logps_TV))
        self._off_text: dict[Branch, list[tuple[float, int]]] = {}
        self._places: dict[Branch, int] = {}

    def children(self, branch: Branch) -> list[tuple[float, int]] | None:
        """(log probability, token) of what follows, the likeliest first; None: not computed."""
        return self._off_text.get(branch) if branch[1] else self._on_text[branch[0]]

    def forget(self) -> None:
        """Drop what has been computed off the text."""
        if self._places:
            self._cache.crop(-len(self._places))
        self._off_text.clear()
        self._places.clear()

    def compute(self, branches: Sequence[Branch]) -> None:
        """What follows each, in one pass; what each is made of has been computed before."""
        first = len(self.text.prompt)
        before = first + len(self.text.ids) + len(self._places)
        mask_QP = torch.full((len(branches), before + len(branches)), -torch.inf)
        for at, (on_text, off_text) in enumerate(branches):
            mask_QP[at, : first + on_text] = 0
            seen = [self._places[on_text, off_text[:n]] for n in range(1, len(off_text))]
            mask_QP[at, [*seen, before + at]] = 0
        positions = [first + on_text + len(off_text) - 1 for on_text, off_text in branches]
        logps_QV = self._compute(
            input_ids=torch.tensor([[off_text[-1] for _, off_text in branches]]),
            position_ids=torch.tensor([positions]),
            attention_mask=mask_QP[None, None],
        )
        for at, (branch, found) in enumerate(zip(branches, self._likeliest(logps_QV), strict=True)):
            self._off_text[branch], self._places[branch] = found, before + at

    def _compute(self, **inputs: torch.Tensor) -> torch.Tensor:
        output = self._model(**inputs, past_key_values=self._cache, use_cache=True)
        logps_QV: torch.Tensor = output.logits[0].log_softmax(-1)
        return logps_QV

    def _likeliest(self, logps_QV: torch.Tensor) -> Iterator[list[tuple[float, int]]]:
        for logps, tokens in zip(*logps_QV.topk(self.most), strict=True):
            yield list(zip(logps.tolist(), tokens.tolist(), strict=True))


def grow_all(branches: Branches) -> Iterator[tuple[list[Node], list[Node]]]:
    """From each place of the text its likeliest nodes, the likeliest first; and the chain."""
    places = range(len(branches.text.ids))
    for first in places[::BLOCK]:
        branches.forget()
        trees: dict[int, list[Node]] = {}
        growing = places[first : first + BLOCK]
        while len(trees) < len(growing):
            wanted: dict[Branch, None] = {}
            for start in growing:
                if start not in trees:
                    nodes, missing = grow(branches, start)
                    wanted.update(dict.fromkeys(missing[:WIDTH]))
                    if not missing:
                        trees[start] = nodes
            if wanted:
                branches.compute(list(wanted))
        yield from ((trees[start], follow(branches, start)) for start in growing)


def grow(branches: Branches, start: int) -> tuple[list[Node], list[Branch]]:
    """The likeliest nodes by what has been computed, and those of them that have yet to be."""
    nodes: list[Node] = []
    missing: list[Branch] = []
    waiting = [(0.0, Node(0.0, 0, ()))]
    while True:
        _, node = heapq.heappop(waiting)
        nodes.append(node)
        if len(nodes) > branches.most:
            return nodes[1:], missing  # the first is the place itself
        children = branches.children((start + node.on_text, node.off_text))
        if children is None:
            missing.append((start + node.on_text, node.off_text))
        for child in step(branches, start, node, children or ()):
            heapq.heappush(waiting, (-child.logp, child))


def step(
    branches: Branches, start: int, node: Node, children: Iterable[tuple[float, int]]
) -> Iterator[Node]:
    """A node's children, one of which may be the text's next token."""
    rest = branches.text.ids[start + node.on_text :]
    for logp, token in children:
        if not node.off_text and rest and token == rest[0]:
            yield Node(node.logp + logp, node.on_text + 1, ())
        else:
            yield Node(node.logp + logp, node.on_text, (*node.off_text, token))


def follow(branches: Branches, start: int) -> list[Node]:
    """The likeliest token of each step. Of what was too unlikely for the tree, the tokens and
    probabilities are not known: that it is off the text is."""
    node, chain = Node(0.0, 0, ()), list[Node]()
    while len(chain) < branches.most:
        children = branches.children((start + node.on_text, node.off_text))
        if children is None:
            node = Node(-math.inf, node.on_text, (*node.off_text, -1))
        else:
            node = next(step(branches, start, node, children))
        chain.append(node)
    return chain


@dataclass(slots=True)
class Walk:
    """Through a text with one way to draft."""

    tokens: int = 0
    passes: int = 0
    nodes: int = 0
    steps: int = 0

    def go(self, trees: Sequence[Sequence[Node]]) -> Walk:
        """By what is drafted at each place."""
        while self.tokens < len(trees):
            drafted = trees[self.tokens]
            agreed = sum(not node.off_text for node in drafted)
            self.nodes += len(drafted)
            self.steps += max((node.depth for node in drafted), default=0)
            self.tokens = min(self.tokens + agreed + 1, len(trees))
            self.passes += 1
        return self


def walk_all(branches: Branches, counts: Sequence[int]) -> dict[str, Walk]:
    """Through a text with trees and chains, each also stopped at several probabilities."""
    grown = list(grow_all(branches))
    walks = {}
    for count, stop in product(counts, (0.0, *STOPS)):
        least = math.log(stop) if stop else -math.inf
        for kind, drafts in zip(("tree", "chain"), zip(*grown, strict=True), strict=True):
            name = f"{kind} of {count}" + (f", stopped at {stop}" if stop else "")
            cut = [[n for n in nodes[:count] if n.logp >= least] for nodes in drafts]
            walks[name] = Walk().go(cut)
    return walks


def describe(texts: Sequence[Mapping[str, Walk]]) -> dict[str, Any]:
    """Tokens, nodes and steps a pass of each way to draft, over some texts."""
    found = {}
    for name in texts[0]:
        passes = sum(walks[name].passes for walks in texts)
        sums = {
            "tokens": sum(walks[name].tokens for walks in texts),
            "nodes": sum(walks[name].nodes for walks in texts),
            "steps": sum(walks[name].steps for walks in texts),
        }
        found[name] = {key: round(value / passes, 3) for key, value in sums.items()}
    return found


if __name__ == "__main__":
    main()
