"""What requests ask of an engine over several devices is as on one: constraints, beginnings in
common, drafts that are trees, every kind of weights."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import adapted
from assets import open_runner, tiny_checkpoint
from byte_model import byte_model
from fake_device import NearDevice, named_twice, opened_as
from packed_models import write_packed
from packings import PACKINGS
from small_engine import PROMPTS, drafted, drafts_always, make_engine, message, texts_of
from zoo import IDS, MIXTURES, zoo_model

from layer_streamer.llm.drafts.drafting import GRAMMAR
from layer_streamer.llm.drafts.tree import ROOT, Tree
from layer_streamer.llm.metadata import load_config

LAYERS = 4
COUNTS = [2, pytest.param(3, marks=pytest.mark.slow)]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "unit": {"enum": ["ms", "km"]}},
    "required": ["name", "unit"],
    "additionalProperties": False,
}
several = pytest.mark.parametrize("count", COUNTS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("several")
    return byte_model(folder, num_hidden_layers=LAYERS, max_position_embeddings=1024)


@pytest.fixture(autouse=True)
def devices_of_their_own() -> Iterator[None]:
    with opened_as(lambda number: NearDevice()), named_twice():
        yield


@several
@pytest.mark.parametrize("kv", [pytest.param("device", marks=pytest.mark.slow), "host"])
def test_texts_are_held_to_what_they_are_asked_for(path: Path, count: int, kv: str) -> None:
    asked: dict[str, Any] = {"schema": PERSON, "max_new_tokens": 60, "return_details": True}
    found = []
    for devices in (["cpu"], ["cpu"] * count):
        with make_engine(path, device=devices, lookup=True, kv=kv) as engine:
            found.append(engine.generate(["a", "bc"], temperature=1.0, seed=5, **asked))
    for one, other in zip(*found, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, "stop")
        assert json.loads(one.text).keys() == {"name", "unit"} and one.drafts[GRAMMAR].agreed > 9


@several
@pytest.mark.parametrize(
    "options",
    [
        {"kv": "host"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"kv": "host", "kv_int8": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_beginning_that_prompts_have_in_common_is_computed_once(
    path: Path, count: int, options: dict[str, Any]
) -> None:
    begin = [11, 12, 13, 14] * 70
    prompts = [[*begin, 5], [*begin, 6, 7], [8, 9]]
    asked: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "return_details": True}
    given: dict[str, Any] = {"max_length": 512, "kv_tokens": 2048, **options}
    found = []
    for devices in (["cpu"], ["cpu"] * count):
        with make_engine(path, device=devices, **given) as engine:
            texts = [engine.generate(prompts, **asked) for _ in range(2)]
            kept = [*begin, 5, *texts[0][0].ids, 20, 21]
            again = [engine.generate(ids, reuse_prefix=True, **asked) for ids in (kept, kept)]
            found.append([(d.ids, d.cached_tokens) for d in (*texts[0], *texts[1], *again)])
    assert found[1] == found[0]
    assert [cached for _, cached in found[1]][3:6] == [256, 256, 0]


def grown(seed: int) -> Any:
    """What follows for a while, somewhere in a tree of other tokens."""
    dice = random.Random(seed)

    def how(rest: list[int], most: int) -> Tree:
        tokens = list(rest[: dice.randrange(5)])
        parents = list(range(ROOT, len(tokens) - 1))
        for _ in range(dice.randrange(6)):
            parents.append(dice.randrange(ROOT, len(tokens)))
            tokens.append(dice.randrange(200))
        return Tree(tuple(tokens[:most]), tuple(parents[:most]))

    return how


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"kv": "host", "prefill_chunk": 3}),
        *(
            pytest.param(count, options, marks=pytest.mark.slow)
            for count in (2, 3)
            for options in (
                {},
                {"kv": "host"},
                {"host_layers": 2},
                {"kv": "host", "kv_int8": True},
                {"reproducible": True},
                {"max_batch": 2},
            )
        ),
    ],
    ids=str,
)
def test_drafts_that_are_trees_change_no_text(
    path: Path, count: int, options: dict[str, Any]
) -> None:
    with make_engine(path, device="cpu", lookup=True, **options) as engine:
        plain = texts_of(engine, temperature=0.0)
    with make_engine(path, device=["cpu"] * count, lookup=True, **options) as engine:
        for seed in range(2):
            script = drafted(engine, plain, grown(seed), temperature=0.0)
            assert any(agreed for _, agreed in script.judged)


def told(path: Path, devices: list[str], **options: Any) -> list[torch.Tensor]:
    """Logits of a prompt, and of what follows."""
    with open_runner(path, load_config(path), device=devices, **options) as runner:
        row = runner.kv.rows.add(60)
        assert row is not None
        return [runner.forward([(row, ids)]) for ids in (IDS[:20], IDS[20:21], IDS[21:24])]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@several
@pytest.mark.parametrize(
    "packing", [pytest.param(p, marks=[] if p == "ct4-g32" else pytest.mark.slow) for p in PACKINGS]
)
def test_weights_of_few_bits_are_unpacked_on_each_device(
    tmp_path: Path, packing: str, count: int
) -> None:
    model = zoo_model("qwen2", hidden_size=128, intermediate_size=128)
    path = write_packed(tmp_path, model, packing)
    assert same(told(path, ["cpu"] * count), told(path, ["cpu"]))


@several
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "qwen2_moe" else pytest.mark.slow) for n in MIXTURES]
)
def test_mixtures_of_which_whole_layers_stream_go_to_each_device(
    tmp_path: Path, name: str, count: int
) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model(name))
    for options in ({}, {"computed": (1,)}):
        assert same(told(path, ["cpu"] * count, **options), told(path, ["cpu"], **options))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_an_adapter_is_beside_packed_layers_and_those_of_the_host(
    tmp_path: Path, count: int
) -> None:
    network = zoo_model("llama")
    path = write_packed(tmp_path / "base", network, "ct8-g32")
    adapted(network, tmp_path / "adapter")
    found = []
    for devices in (["cpu"], ["cpu"] * count):
        options: dict[str, Any] = {"adapter": tmp_path / "adapter", "host_layers": 1}
        with make_engine(path, device=devices, lookup=True, **options) as engine:
            found.append([done.ids for done in texts_of(engine, temperature=0.0)])
    assert found[1] == found[0]


TOGETHER: list[dict[str, Any]] = [
    {},
    {"reproducible": True},
    {"max_batch": 1},
    {"max_batch": 2, "prefill_chunk": 3},
    {"kv": "host", "kv_int8": True},
    {"host_layers": 2},
    {"device_budget": "24MiB"},
    {"device_budget": "64MiB", "dtype": torch.bfloat16},
    {"n_cpu_pinned": 1, "n_cpu": 1, "n_gpu": 1, "dtype": torch.float16},
    {"host_budget": "64MiB", "read_mode": "buffered", "n_gpu": 0},
]


@pytest.mark.slow
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("draft", [None, "self", "model"])
@pytest.mark.parametrize("options", TOGETHER, ids=str)
def test_what_goes_together_on_one_device_does_so_over_several(
    path: Path, options: dict[str, Any], draft: str | None, lookup: bool
) -> None:
    """To the same text, or refused by the same line."""
    given = options | {"draft": path if draft == "model" else draft, "lookup": lookup}
    asked: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "return_details": True}
    found: list[Any] = []
    for count in (1, 2, 3):
        try:
            with make_engine(path, device=["cpu"] * count, **given) as engine:
                if engine.scheduler.drafting is not None:
                    drafts_always(engine)
                found.append([done.ids for done in engine.generate(PROMPTS, **asked)])
        except ValueError as error:
            found.append(message(error))
    assert found[1] == found[0] == found[2]
    refused = draft == "self" and ("host_layers" in options or options.get("kv") == "host")
    assert isinstance(found[0], str) == refused
