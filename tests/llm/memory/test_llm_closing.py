"""A closed engine has nothing any more, though somebody still has the engine."""

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
from small_engine import PROMPTS, drafts_always, make_engine
from support import footprint, held_nbytes
from zoo import zoo_model

from layer_streamer import ClosedError
from layer_streamer.llm.engine import StreamingEngine

ASKED: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "return_details": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    found = byte_model(tmp_path_factory.mktemp("closing"), num_hidden_layers=4)
    with make_engine(found) as engine:  # what a process takes once
        engine.generate(PROMPTS, **ASKED)
    return found


@pytest.fixture(autouse=True)
def devices_of_their_own() -> Iterator[None]:
    with opened_as(lambda number: NearDevice()), named_twice():
        yield


def check(path: Path, options: dict[str, Any]) -> StreamingEngine:
    """An engine that has been used, and closed."""
    before = held_nbytes(), footprint()
    engine = make_engine(path, **options)
    if engine.scheduler.drafting is not None:
        drafts_always(engine)
    engine.generate(PROMPTS, **ASKED)
    assert held_nbytes() > before[0]
    for _ in range(2):
        engine.close()
        assert (held_nbytes(), footprint()) == before
    return engine


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("draft", [None, "self", pytest.param("model", marks=pytest.mark.slow)])
def test_all_tensors_and_files_are_given_back(path: Path, count: int, draft: str | None) -> None:
    options = {"draft": path if draft == "model" else draft, "lookup": draft is None}
    check(path, {"device": ["cpu"] * count, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "host"},
        pytest.param({"kv": "host", "kv_int8": True}, marks=pytest.mark.slow),
        pytest.param({"host_layers": 2}, marks=pytest.mark.slow),
        pytest.param({"reproducible": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_so_they_are_with_other_options(path: Path, options: dict[str, Any]) -> None:
    check(path, {"device": ["cpu", "cpu"], **options})


def test_so_is_an_adapter(tmp_path: Path) -> None:
    network = zoo_model("llama")
    base = tiny_checkpoint(tmp_path / "base", network)
    adapted(network, tmp_path / "adapter")
    del network
    found = held_nbytes()
    with make_engine(base, adapter=tmp_path / "adapter", draft="self") as engine:
        engine.generate(PROMPTS, **ASKED)
    assert engine.model.names.adapter is not None
    kept = engine.model.names.adapter.numel * 4
    assert found <= held_nbytes() <= found + kept, "as it was read, by the model"


def test_what_is_asked_of_a_closed_engine_is_told_so(path: Path) -> None:
    engine = make_engine(path, draft="self")
    engine.close()
    for ask in (lambda: engine.generate(PROMPTS[0]), lambda: list(engine.embed(PROMPTS))):
        with pytest.raises(ClosedError, match="closed"):
            ask()
