"""An output head that is never whole on the device: its rows are streamed, some at a time.

They have a streamer of their own, of which each call of the head is a pass. So it does not matter
when the head is called, how often, or not at all, and its first rows are there when it is: they
were fetched while the blocks before it computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ...checkpoint.manifest import FrozenMapping, LayerSpec, Manifest
from ...errors import StreamerError
from ...passes.inputs import move
from ...planning.layout import split_rows
from ...streamer import LayerStreamer
from ..naming.recipe import Recipe
from ..sequence import spec_of

CHUNK = 32 << 20
"""Bytes of rows that are handed out together, at most: a link is at its full rate by then, and the
slots for them take little."""
FEWEST = 8
"""Chunks that a head is cut into at least: less would be on the device for the most part."""
KEY = "weight"


def manifest_of_rows(manifest: Manifest, recipe: Recipe) -> Manifest:
    """A manifest whose layers are chunks of one parameter's rows, in order."""
    spec = spec_of(recipe)
    limit = max(1, min(CHUNK, -(-spec.nbytes // FEWEST)))
    chunks = enumerate(split_rows(spec, limit))
    files = {path: stamp for path, stamp in manifest.files.items() if path == spec.path}
    return replace(
        manifest,
        layers=tuple(LayerSpec(i, FrozenMapping({KEY: chunk})) for i, chunk in chunks),
        static=FrozenMapping({}),
        files=FrozenMapping(files),
        layer_pattern=None,
    )


class _Product(torch.autograd.Function):
    """What a head gives, of which a backward needs the head's rows and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, head: Head, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.head = head
        return head.multiply(input, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.head.multiply_back(gradient), None, None


class Head:
    """Stands in the place of a linear module's forward.

    Thread rules: those of a sweep, one call at a time.
    """

    def __init__(self, streamer: LayerStreamer, name: str) -> None:
        """``streamer``: of a manifest of :func:`manifest_of_rows`; it is not closed by this.
        ``name``: of the module, for errors."""
        self._streamer = streamer
        self._name = name
        counts = (layer.tensors[KEY].shape[0] for layer in streamer.manifest.layers)
        self._ends = (0, *accumulate(counts))
        """The rows that chunk i begins and ends with are the ones at i and i + 1."""

    def register(self, module: nn.Linear, away: torch.Tensor) -> None:
        """Be the module's forward. ``away``: what is there as its weight."""
        module._parameters["weight"] = away  # type: ignore[assignment]
        self._module = weakref.ref(module)
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``, shape (..., rows), where ``input`` is; a chunk of rows at a
        time. A backward takes the rows once more.

        Raises what a sweep raises, with the module's name.
        """
        if torch.compiler.is_compiling():
            raise StreamerError(
                f"{self._name}: its rows stream, which torch.compile cannot trace: compile blocks, "
                "or have it on the device (head='device')"
            )
        module = self._module()
        assert module is not None
        bias = module.bias
        if not (torch.is_grad_enabled() and input.requires_grad):
            return self.multiply(input, bias)
        trained = bias is not None and bias.requires_grad
        out: torch.Tensor = _Product.apply(input, self, None if trained else bias)  # type: ignore[no-untyped-call]
        return out + bias if trained else out

    def multiply(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As :meth:`forward`, without gradients."""
        out: torch.Tensor | None = None
        with closing(self._chunks()) as chunks:
            for weight, rows in chunks:
                some = move(bias[rows], weight.device) if bias is not None else None
                part = linear(move(input, weight.device), weight, some)
                if out is None:
                    shape = (*part.shape[:-1], self._ends[-1])
                    out = part.new_empty(shape, device=input.device)
                out[..., rows] = move(part, out.device)
        assert out is not None
        return out

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """``gradient @ weight``, shape (..., columns), summed over chunks in float32 or better."""
        sum_: torch.Tensor | None = None
        with closing(self._chunks()) as chunks:
            for weight, rows in chunks:
                part = move(gradient[..., rows], weight.device)
                part = part @ weight.to(part.dtype)  # another one where autocast has multiplied
                part = move(part, gradient.device)
                wide = torch.promote_types(part.dtype, torch.float32)
                sum_ = part.to(wide) if sum_ is None else sum_.add_(part)
        assert sum_ is not None
        return sum_.to(gradient.dtype)

    def _chunks(self) -> Generator[tuple[torch.Tensor, slice], None, None]:
        """Weights of some rows, and which these are: one pass."""
        try:
            with closing(self._streamer.sweep(on_host=False)) as steps:
                for i, weights in steps:
                    yield weights[KEY], slice(self._ends[i], self._ends[i + 1])
        except StreamerError as error:
            error.args = (f"{self._name}: {error}",)
            raise

    def __reduce__(self) -> NoReturn:
        raise StreamerError(
            "a model whose weights stream cannot be copied or pickled: stream it a second time"
        )
