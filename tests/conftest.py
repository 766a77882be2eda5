"""A tiny checkpoint and a streamer of it, on every route that a layer can take."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import settings
from parts import keep_own_part
from routes import NUM_LAYERS, default_params, make_devices, open_route

from layer_streamer import LayerStreamer

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of how long an example takes nothing follows on a machine that does other things, too.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

NUM_THREADS = torch.get_num_threads()
# For tiny tensors: two threads on two busy cores wait for each other most of the time.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Next to nothing of what is imported and collected is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A process that runs checks of other tests may be there for a part of them."""
    keep_own_part(config, items)


@pytest.fixture(scope="module", autouse=True)
def only_this_modules_garbage() -> None:
    """Collections, of which there are many, do not look through torch and all that was before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_many_threads_as_usual(request: pytest.FixtureRequest) -> Iterator[None]:
    """What runs on a GPU is compared with larger tensors on the CPU."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_limits_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not depend on what a probe of the machine under test has measured."""
    monkeypatch.setattr("layer_streamer.assembly.load_limits", lambda path, **options: None)


@pytest.fixture(autouse=True)
def hub_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of the examples, run in this process, tell the hub's library to stay offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that what was there before comes back
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    return tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)


@pytest.fixture(params=default_params())
def route(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def device(route: str) -> Any:
    """The route's device, or devices."""
    return make_devices(route)


@pytest.fixture
def streamer(
    tmp_path: Path, tensors: dict[str, torch.Tensor], route: str, device: Any
) -> Iterator[LayerStreamer]:
    with open_route(route, tmp_path, device) as opened:
        yield opened
