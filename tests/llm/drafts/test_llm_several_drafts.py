"""Drafts over several devices: the text of one, in as many passes, whatever drafts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import adapted
from assets import tiny_checkpoint
from byte_model import byte_model
from fake_device import NearDevice, named_twice, opened_as
from gguf_models import write_gguf
from small_engine import PROMPTS, drafts_always, make_engine
from zoo import zoo_model

from layer_streamer.llm.drafts import own_weights
from layer_streamer.llm.drafts.held_layers import HeldLayers
from layer_streamer.llm.engine import StreamingEngine

LAYERS = 4
TWO, THREE = ["cpu"] * 2, ["cpu"] * 3
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 3, "repetition_penalty": 1.2}
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return byte_model(tmp_path_factory.mktemp("several"), num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def devices_of_their_own() -> Iterator[None]:
    with opened_as(lambda number: NearDevice()), named_twice():
        yield


@pytest.fixture
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model's own weights, which four bits change too much."""
    monkeypatch.setattr(own_weights, "BITS", 8)
    monkeypatch.setattr(own_weights, "MOST", 2.0)


def eager(engine: StreamingEngine) -> StreamingEngine:
    """It drafts trees of eight tokens, whatever is measured."""
    steps = steps_of(engine)
    steps._goes_on = lambda count, *_: count < 4
    steps._worth_it = lambda count, likely: 4
    return drafts_always(engine)


def steps_of(engine: StreamingEngine) -> Any:
    assert engine.scheduler.drafting is not None
    (source,) = engine.scheduler.drafting._sources.values()
    return source._steps  # type: ignore[attr-defined]


def said(engine: StreamingEngine, **options: Any) -> list[tuple[Any, ...]]:
    """Texts, and what became of drafts."""
    asked = {"max_new_tokens": 14, "return_details": True, **options}
    found = engine.generate(PROMPTS, **asked)
    return [(one.ids, one.text, one.finish_reason, one.passes, one.agreed) for one in found]


@pytest.fixture(scope="module")
def on_one() -> dict[str | None, Any]:
    """What one device says, by what drafts."""
    return {}


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize(
    ("draft", "count"),
    [
        ("self", 2),
        ("self", 3),
        pytest.param("same", 2, marks=pytest.mark.slow),
        pytest.param("same", 3, marks=pytest.mark.slow),
    ],
)
def test_drafts_agree_over_several_devices_as_often_as_on_one(
    path: Path, on_one: dict[str | None, Any], draft: str, count: int
) -> None:
    chosen = path if draft == "same" else draft
    if not on_one:
        with make_engine(path) as engine:
            on_one[None] = [said(engine, **options) for options in (GREEDY, SAMPLED)]
    for where in [*(() if draft in on_one else ["cpu"]), ["cpu"] * count]:
        with eager(make_engine(path, device=where, draft=chosen)) as engine:
            found = [said(engine, **options) for options in (GREEDY, SAMPLED)]
            assert found == on_one.setdefault(draft, found)
    for some, plain in zip(found, on_one[None], strict=True):
        assert [one[:3] for one in some] == [one[:3] for one in plain]
    assert all(2 * passes < len(ids) for ids, _, _, passes, _ in found[0])


@pytest.mark.usefixtures("eight_bits")
def test_own_weights_have_the_adapter_on_each_device(tmp_path: Path) -> None:
    network = zoo_model("llama")
    base = tiny_checkpoint(tmp_path / "base", network)
    adapted(network, tmp_path / "adapter")
    found = []
    for where in ("cpu", TWO):
        options: dict[str, Any] = {"device": where, "adapter": tmp_path / "adapter"}
        with eager(make_engine(base, draft="self", **options)) as engine:
            found.append(said(engine, **GREEDY))
            sides = zip(engine._runner.sides, steps_of(engine)._runner.sides, strict=True)
            for own, drafts in sides:
                assert own._names.adapter is drafts._names.adapter, "one copy on each"
    assert found[1] == found[0] and all(agreed > passes for *_, passes, agreed in found[1])


@pytest.mark.slow
@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("device", [TWO, THREE], ids=len)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral", "qwen2-window"])
def test_it_is_so_of_packed_layers_and_of_windows(
    tmp_path: Path, name: str, device: list[str]
) -> None:
    network, found = zoo_model(name, num_hidden_layers=4), []
    if name == "llama":  # whose rows of queries and keys are in an order of their own in such files
        write_gguf(tmp_path / "model.gguf", network)
    else:
        network.save_pretrained(tmp_path)
    path = tmp_path / "model.gguf" if name == "llama" else tmp_path
    for where in ("cpu", device):
        with eager(make_engine(path, device=where, draft="self")) as engine:
            found.append(said(engine, max_new_tokens=40, **GREEDY))
    assert found[1] == found[0]


@pytest.mark.parametrize("where", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_draft_that_fails_on_either_device_costs_itself_and_not_the_row(
    path: Path, where: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with make_engine(path) as engine:
        expected = [one[:3] for one in said(engine, **GREEDY)]
    with eager(make_engine(path, device=TWO, draft="self")) as engine:
        held, calls = steps_of(engine)._runner.streamer, 0
        run_pass = held.run_pass

        def fails(x: Any, layer_fn: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            bad = calls % 3 == 2

            def layer(x: Any, tensors: Any, layer_idx: int) -> Any:
                x = layer_fn(x, tensors, layer_idx)
                if bad and layer_idx == where:
                    raise torch.OutOfMemoryError("no room for a draft")
                return x

            return run_pass(x, layer, **options)

        monkeypatch.setattr(held, "run_pass", fails)
        assert [one[:3] for one in said(engine, **GREEDY)] == expected
    assert calls > 10 and "no room for a draft" in caplog.text


def test_each_device_has_a_part_of_the_draft_in_the_plan(path: Path) -> None:
    with make_engine(path, device=TWO, draft="self", device_budget="64MiB") as engine:
        parts, held = engine.plan.devices, steps_of(engine)._runner.streamer
        assert isinstance(held, HeldLayers)
        layers = [sum(t.nbytes for t in some.values()) for some in held._tensors]
        for number in range(2):
            assert parts[number]["draft"] > sum(layers[number::2])
        head = engine.model.manifest.static[engine.model.names.head].nbytes
        assert parts[0]["static tensors"] - parts[1]["static tensors"] == head, "the first has it"
        needed = engine.plan.device_nbytes
    with pytest.raises(ValueError, match="draft ") as caught:
        make_engine(path, device=TWO, draft="self", device_budget=needed - parts[1]["draft"])
    assert "\n" not in str(caught.value)
