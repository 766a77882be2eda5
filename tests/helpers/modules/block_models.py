"""Plain models of blocks for the tests: each writes its checkpoint, streams, and runs resident."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice
from routes import ROUTES, open_route
from support import open_checkpoint
from torch import nn

from layer_streamer import LayerStreamer
from layer_streamer.modules.blocks import find_stacks
from layer_streamer.modules.runner import Runner

NUM_BLOCKS = 7
HIDDEN = 40
POOLS = {"n_gpu": 1, "n_cpu_pinned": 1, "n_cpu": 1}


class Part(nn.Module):
    """A block: a projection with a bias, a norm of its own, and a persistent buffer."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.register_buffer("scale", torch.ones(hidden))
        self.register_buffer("table", torch.arange(hidden) / hidden, persistent=False)
        self.act: Callable[[], None] | None = None
        """Called in the midst of a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = torch.tanh(self.up(self.norm(x)))
        if self.act is not None:
            self.act()
        return x + self.down(middle) * self.scale + self.table


class Net(nn.Module):
    """Blocks between an embedding and a head; ``way`` is the order in which they are called."""

    def __init__(self, count: int = NUM_BLOCKS, make: Callable[[], nn.Module] = Part) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(make() for _ in range(count))
        self.head = nn.Linear(HIDDEN, 3)
        self.way: Sequence[int] = range(count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for i in self.way:
            x = self.blocks[i](x)
        result: torch.Tensor = self.head(x)
        return result


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random values, the same for a seed, and no gradients."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return model.eval().requires_grad_(False)


def write_model(path: Path, model: nn.Module) -> None:
    """The model's state as one file of a folder."""
    path.mkdir(exist_ok=True, parents=True)
    write_safetensors(path / "model.safetensors", model.state_dict())


def emptied(make: Callable[[], nn.Module], resident: nn.Module) -> nn.Module:
    """Another such model, whose blocks are on meta, and all else is as in ``resident``."""
    with torch.device("meta"):
        model = make().eval().requires_grad_(False)
    blocks = {f"{block.name}." for block in find_stacks(model, ["blocks.{i}."])[0].blocks}
    for name, module in model.named_modules():
        source = resident.get_submodule(name)
        for leaf, buffer in source._buffers.items():
            if leaf in source._non_persistent_buffers_set:
                module._buffers[leaf] = buffer
        if not f"{name}.".startswith(tuple(blocks)):
            module._parameters.update(source._parameters)
    return model


class Streamed:
    """A model that streams and the same one resident.

    ``route``: one of tests' routes, and its device; ``options`` go before its. None: host pools.
    """

    def __init__(
        self,
        path: Path,
        make: Callable[[], nn.Module] = Net,
        *,
        route: str | None = None,
        device: Any = None,
        strict: bool = False,
        **options: Any,
    ) -> None:
        self.resident = randomized(make())
        write_model(path, self.resident)
        self.on = "cuda" if route is not None and ROUTES[route].kind == "cuda" else "cpu"
        self.model: Any = emptied(make, self.resident.to(self.on))
        options = {"layer_pattern": "blocks.{i}.", **options}
        self.streamer = (
            open_route(route, path, device, **options)
            if route is not None
            else open_checkpoint(device, path, **{**POOLS, **options})
        )
        self.runner = self._runner(strict=strict)
        for block in self.model.blocks:  # after the runner's: a late device's work is done
            block.register_forward_pre_hook(lambda module, args: finish(device))

    def _runner(self, **options: Any) -> Runner:
        blocks = find_stacks(self.model, ["blocks.{i}."])[0].blocks
        return Runner(self.streamer, blocks, **options)

    def stream_again(self) -> None:
        """With a new runner."""
        self.runner.close()
        self.runner = self._runner()

    def close(self) -> None:
        self.runner.close()
        self.streamer.close()

    def agree(self, seed: int = 1, way: Iterable[int] | None = None) -> None:
        """Fail unless both models give the same bits."""
        x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(self.on)
        for model in (self.model, self.resident):
            if way is not None:
                model.way = tuple(way)
        with torch.no_grad():
            assert torch.equal(self.model(x), self.resident(x))


def finish(device: Any) -> None:
    """Have a late device, or several, do its work."""
    for one in device if isinstance(device, list) else [device]:
        if isinstance(one, FakeDevice):
            one.drain()


@contextmanager
def streamed(path: Path, make: Callable[[], nn.Module] = Net, **options: Any) -> Iterator[Streamed]:
    """Closed at the end."""
    some = Streamed(path, make, **options)
    try:
        yield some
    finally:
        some.close()


def unfinished(streamer: LayerStreamer) -> bool:
    """Whether a layer is handed out, or was when its pass broke off."""
    run = streamer._parts.pipeline.control.run  # type: ignore[union-attr]
    return run is not None and not run.aborted and run.handed > run.released
