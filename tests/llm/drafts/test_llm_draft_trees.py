"""Drafts that are trees, whatever they are, leave the text as it is, and each token of them is
computed as if its branch stood alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint
from byte_model import byte_model
from hypothesis import strategies as st
from small_engine import (
    CHOICES,
    NEW,
    PROMPTS,
    SAMPLED,
    Script,
    drafted,
    make_engine,
    texts_of,
)
from tried import slow_but, tried
from zoo import IDS, zoo_model

from layer_streamer.llm.drafts.drafting import Drafting
from layer_streamer.llm.drafts.tree import ROOT, Tree
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.kv.moves import Move
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner

WINDOWS = ["mistral", "gemma3_text", "qwen2-window"]
TIERS: dict[str, dict[str, Any]] = {
    "device": {"kv": "device"},
    "host": {"kv": "host"},
    "chunks": {"kv": "device", "prefill_chunk": 3},
    "chunks on the host": {"kv": "host", "prefill_chunk": 3},
    "eight bits": {"kv": "host", "prefill_chunk": 3, "kv_int8": True, "reproducible": True},
    "rows that enter later": {"kv": "host", "max_batch": 2},
    "reproducible": {"reproducible": True},
}
How = Callable[[list[int], int], Tree]


def shuffled(tree: Tree, dice: random.Random) -> Tree:
    """The same tree in another order."""
    ready = [i for i, parent in enumerate(tree.parents) if parent == ROOT]
    order: list[int] = []
    while ready:
        node = ready.pop(dice.randrange(len(ready)))
        order.append(node)
        ready += [i for i, parent in enumerate(tree.parents) if parent == node]
    at = {ROOT: ROOT} | {node: i for i, node in enumerate(order)}
    return Tree(
        tuple(tree.tokens[node] for node in order), tuple(at[tree.parents[node]] for node in order)
    )


def grown(seed: int) -> How:
    """What follows for a while, or more than that, somewhere in a tree of other tokens; of any
    size, more than is asked for, none."""
    dice = random.Random(seed)

    def how(rest: list[int], most: int) -> Tree:
        good = [*rest, 7, 8, 9][: dice.randrange(len(rest) + 4)]
        tokens, parents = good[: dice.randrange(9)], list(range(ROOT, len(good)))
        parents = parents[: len(tokens)]
        for _ in range(dice.randrange(most + 8)):
            likely = dice.choice(tokens) if tokens and dice.random() < 0.3 else dice.randrange(200)
            parents.append(dice.randrange(ROOT, len(tokens)))
            tokens.append(likely)
        return shuffled(Tree(tuple(tokens), tuple(parents)), dice)

    return how


def last(rest: list[int], most: int) -> Tree:
    """What follows, each time as the last of three; three deep."""
    tokens, parents, parent = list[int](), list[int](), ROOT
    for token in rest[: min(3, most // 3)]:
        tokens += [(token + 1) % 200, (token + 2) % 200, token]
        parents += [parent] * 3
        parent = len(tokens) - 1
    return Tree(tuple(tokens), tuple(parents))


def chain(rest: list[int], most: int) -> Tree:
    """What ``last`` has of the text, alone."""
    return Tree.chain(rest[: min(3, most // 3)])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path, lookup=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(path: Path) -> Iterator[StreamingEngine]:
    """To the bit: whatever is drawn, no text turns on a last one."""
    with make_engine(path, lookup=True, reproducible=True) as engine:
        yield engine


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("how", [last, grown(1)], ids=["last", "grown"])
def test_a_tree_leaves_the_text_as_it_is(shared: Any, choice: str, how: How) -> None:
    plain = texts_of(shared, **CHOICES[choice])
    script = drafted(shared, plain, how, **CHOICES[choice])
    assert sum(agreed for _, agreed in script.judged) > NEW // 2


@pytest.mark.parametrize("tier", slow_but("chunks on the host", TIERS))
def test_a_tree_may_be_verified_wherever_keys_and_values_are(path: Path, tier: str) -> None:
    with make_engine(path, lookup=True, **TIERS[tier]) as engine:
        plain = texts_of(engine, **SAMPLED)
        for how in (last, grown(3)):
            drafted(engine, plain, how, **SAMPLED)


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("gemma3_text", "device"),
        ("qwen2-window", "chunks on the host"),
        pytest.param("mistral", "device", marks=pytest.mark.slow),
        pytest.param("mistral", "chunks on the host", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "chunks on the host", marks=pytest.mark.slow),
        pytest.param("qwen2-window", "device", marks=pytest.mark.slow),
    ],
)
def test_a_tree_may_be_verified_where_layers_have_windows(
    tmp_path: Path, name: str, tier: str
) -> None:
    zoo_model(name).save_pretrained(tmp_path)
    with make_engine(tmp_path, lookup=True, **TIERS[tier]) as engine:
        plain = texts_of(engine, temperature=0.0, max_new_tokens=40)
        for how in (last, grown(4)):
            drafted(engine, plain, how, temperature=0.0, max_new_tokens=40)


def test_drafted_tokens_are_rotated_for_the_lengths_that_they_make(tmp_path: Path) -> None:
    """Where a rotation goes by how long a row is, each of them ends it."""
    zoo_model("llama-dynamic").save_pretrained(tmp_path)
    with make_engine(tmp_path, lookup=True) as engine:
        plain = texts_of(engine, temperature=0.0, max_new_tokens=40)
        for how in (chain, last):
            drafted(engine, plain, how, temperature=0.0, max_new_tokens=40)


@tried(4, 12, seed=st.integers(0, 10**6), new=st.integers(1, 40), stop=st.booleans())
def test_any_trees_leave_any_text_as_it_is(exact: Any, seed: int, new: int, stop: bool) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": seed, "max_new_tokens": new}
    plain = texts_of(exact, **options)
    if stop and len(plain[0].text) > 4:
        options["stop"] = plain[0].text[2:4]
        plain = texts_of(exact, **options)
    drafted(exact, plain, grown(seed), **options)


def test_a_branch_is_followed_as_far_as_it_would_be_alone(shared: Any) -> None:
    plain = texts_of(shared, temperature=0.0)
    trees = drafted(shared, plain, last, temperature=0.0)
    chains = drafted(shared, plain, chain, temperature=0.0)
    assert [agreed for _, agreed in trees.judged] == [agreed for _, agreed in chains.judged]


@pytest.mark.parametrize("kv", ["device", "host"])
def test_a_kept_row_goes_on_from_what_a_tree_has_left(path: Path, kv: str) -> None:
    with make_engine(path, lookup=True, kv=kv) as engine:
        check_kept(engine, PROMPTS[2])


def check_kept(engine: Any, prompt: list[int]) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "reuse_prefix": True, "return_details": True}
    engine.scheduler.drafting = None
    plain = engine.generate(prompt, max_new_tokens=8, **options)
    longer = [*prompt, *plain.ids, 5, 6]
    after = engine.generate(longer, max_new_tokens=8, **options)
    engine.generate([1], max_new_tokens=1)
    texts = [[*prompt, *plain.ids, *([9] * 30)], [*longer, *after.ids]]
    engine.scheduler.drafting = Drafting({"script": Script(texts, last)})
    assert engine.generate(prompt, max_new_tokens=8, **options).ids == plain.ids
    assert engine.generate(longer, max_new_tokens=8, **options).ids == after.ids


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [((1, 2), (0, -1)), ((1, 2), (-1, 1)), ((1,), (-2,)), ((1, 2), (-1,)), ((1.5,), (-1,))],
)
def test_what_is_no_tree_is_a_failure_of_its_drafter(
    shared: Any, tokens: Any, parents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = texts_of(shared, temperature=0.0, max_new_tokens=6)
    drafted(
        shared, plain, lambda rest, most: Tree(tokens, parents), temperature=0.0, max_new_tokens=6
    )
    assert "a drafter failed" in caplog.text


def test_a_tree_that_is_too_large_is_cut_to_its_first_tokens() -> None:
    tree = Tree((1, 2, 3, 4), (-1, -1, 0, 2))
    assert tree.first(3) == Tree((1, 2, 3), (-1, -1, 0)) and tree.first(4) is tree
    assert Tree.chain([4, 5]).is_chain and Tree().is_chain and not tree.is_chain
    assert tree.trunk() == Tree.chain([1, 3, 4]) and Tree.chain([4]).trunk() == Tree.chain([4])
    assert (tree.depths, tree.deepest, list(tree.branches())) == ([1, 1, 2, 3], 3, [[1], [0, 2, 3]])


def test_where_passes_look_at_chains_only_a_tree_is_its_first_branch(shared: Any) -> None:
    plain = texts_of(shared, temperature=0.0)
    forward, seen = shared._runner.forward, list[Tree]()

    def looking(entries: Any, *, drafts: Any, **options: Any) -> torch.Tensor:
        seen.extend(drafts)
        return forward(entries, drafts=drafts, **options)

    def twins(rest: list[int], most: int) -> Tree:
        return Tree((*rest[:2], 5, 6), (ROOT, 0, 0, ROOT)) if len(rest) > 2 else Tree()

    script = Script([[*p, *d.ids] for p, d in zip(PROMPTS, plain, strict=True)], twins)
    shared.scheduler.drafting, shared._runner.forward = (
        Drafting({"script": script}, trees=False),
        looking,
    )
    try:
        found = shared.generate(PROMPTS, max_new_tokens=NEW, temperature=0.0, return_details=True)
    finally:
        shared.scheduler.drafting = None
        del shared._runner.forward
    assert [done.ids for done in found] == [done.ids for done in plain]
    assert {len(tree) for tree in seen} == {0, 2} and all(tree.is_chain for tree in seen)


def random_tree(dice: random.Random, most: int) -> Tree:
    parents = [dice.randrange(ROOT, i) if i else ROOT for i in range(dice.randint(2, most))]
    return Tree(tuple(dice.choices(IDS, k=len(parents))), tuple(parents))


def check_nodes(runner: Runner, seed: int, prompt: int, bound: float = 1e-5) -> None:
    """Logits of every token of a tree, beside another row's, against those of its branch alone;
    then those of what follows the deepest branch, which has moved down."""
    dice = random.Random(seed)
    trees = [random_tree(dice, 20), random_tree(dice, 9)]
    rows = [runner.kv.rows.add(prompt + 90) for _ in range(3)]
    first, second, alone = (row for row in rows if row is not None)
    runner.forward([(first, IDS[:prompt]), (second, IDS[3:9])])
    entries = [(first, [5, *trees[0].tokens]), (second, [6, *trees[1].tokens])]
    found = runner.forward(entries, drafts=trees)
    tree = trees[0]
    for node in range(len(tree)):
        branch = [tree.tokens[i] for i in tree.branch(node)]
        runner.kv.rows.truncate(alone, 0)
        runner.forward([(alone, [*IDS[:prompt], 5])])
        expected = runner.forward([(alone, branch)])
        assert relative_error(found[1 + node], expected[0]) <= bound
    nodes = max(tree.branches(), key=len)
    runner.kv.move([Move(first, prompt + 1, tuple(prompt + 1 + node for node in nodes))])
    runner.kv.rows.truncate(first, prompt + 1 + len(nodes))
    runner.kv.rows.truncate(alone, 0)
    runner.forward([(alone, [*IDS[:prompt], 5, *(tree.tokens[node] for node in nodes)])])
    both = [runner.forward([(row, [9])]) for row in (first, alone)]
    assert relative_error(*both) <= bound
    for row in (first, second, alone):
        runner.kv.rows.drop(row)


NODES = ["llama-one-kv-head", "gemma3_text", "mistral", "qwen2-window"]
PATHS: dict[str, dict[str, Any]] = {
    "device": {},
    "chunks": {"chunking": Chunking(tokens=4, group_rows=True)},
    "host": {"host_layers": (0, 1), "chunking": Chunking(tokens=6)},
    "eight bits": {"host_layers": (0, 1), "int8": True},
}


OF_NODES = [(name, tier) for name in NODES for tier in PATHS if tier != "eight bits"]  # coarse
ONE_OF_EACH = [
    ("llama-one-kv-head", "device"), ("gemma3_text", "host"), ("mistral", "chunks"),
    ("qwen2-window", "host"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tier"),
    [pytest.param(*c, marks=[] if c in ONE_OF_EACH else pytest.mark.slow) for c in OF_NODES],
)
def test_each_token_of_a_tree_is_computed_as_in_its_branch_alone(
    tmp_path: Path, name: str, tier: str
) -> None:
    tiny_checkpoint(tmp_path, zoo_model(name))
    config = load_config(tmp_path)
    with open_runner(
        tmp_path, config, tokens=1024, max_rows=3, dtype=torch.float32, **PATHS[tier]
    ) as runner:
        for seed, prompt in enumerate((1, 30)):
            check_nodes(runner, seed, prompt)


BITS = [("llama", "device"), ("gemma3_text", "chunks"), ("llama", "host")]
BITS += [("gemma3_text", "eight bits")]


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        pytest.param(name, tier, marks=[] if (name, tier) in BITS else pytest.mark.slow)
        for name in ("llama", "gemma3_text")
        for tier in PATHS
    ],
)
def test_its_bits_are_those_of_its_branch_where_passes_are_reproducible(
    tmp_path: Path, name: str, tier: str
) -> None:
    tiny_checkpoint(tmp_path, zoo_model(name))
    options = dict(PATHS[tier])
    options["chunking"] = Chunking(tokens=6 if tier == "host" else 64, reproducible=True)
    config = load_config(tmp_path)
    with open_runner(
        tmp_path, config, tokens=1024, max_rows=3, dtype=torch.float32, **options
    ) as runner:
        check_nodes(runner, 3, 14, bound=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-dynamic", "qwen3-yarn", *WINDOWS])
@pytest.mark.parametrize("tier", TIERS)
def test_it_is_so_for_many_trees(tmp_path: Path, name: str, tier: str) -> None:
    if name == "llama-dynamic" and "reproducible" in TIERS[tier]:
        pytest.skip("refused")
    zoo_model(name).save_pretrained(tmp_path)
    with make_engine(tmp_path, lookup=True, **TIERS[tier]) as engine:
        for options in ({"temperature": 0.0}, SAMPLED | {"top_k": 0, "seed": 4}):
            plain = texts_of(engine, max_new_tokens=40, **options)
            for seed in range(6):
                drafted(engine, plain, grown(seed), max_new_tokens=40, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["device", "host"])
@pytest.mark.parametrize("name", ["llama", *WINDOWS])
def test_on_a_gpu_a_tree_leaves_the_text_as_it_is(tmp_path: Path, name: str, kv: str) -> None:
    zoo_model(name).save_pretrained(tmp_path)
    options = {"device": "cuda:0", "dtype": torch.float32, "kv": kv}
    with make_engine(tmp_path, lookup=True, **options) as engine:
        plain = texts_of(engine, temperature=0.0, max_new_tokens=40)
        for how in (last, grown(1), grown(2)):
            drafted(engine, plain, how, temperature=0.0, max_new_tokens=40)
