"""Opens a pipeline: its own class, its own call, and components that stream within one budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...devices.accelerator import open_devices
from ...errors import ConfigError, StreamerError, printable
from ...planning.options import Options
from ..blocks import Block, find_stacks
from ..opening import (
    Prepared,
    Sequences,
    Wishes,
    build_model,
    open_models,
    prepare,
    sequences_of,
    with_one_slot,
)
from .adapters import let_adapters_load
from .handle import PipelineStreamer
from .index import LIBRARIES, check_given, models_of, pipeline_class
from .refusals import refuse

SLOTS = 3
"""A sequence streams that is larger than so many of its largest blocks, which its slots take."""


def open_pipeline(cls: Any, folder: Path, options: Options, wishes: Wishes, reserve: int) -> Any:
    """The pipeline of a folder; ``wishes.model_options`` are components in place of its own.

    Models of transformers and diffusers stream where that spares device memory. All else is what
    the pipeline's class loads, on the first device; it counts in ``device_budget``, of which
    ``reserve`` bytes are the caller's. Errors: ConfigError, CheckpointError with the component's
    name; nothing is left open.
    """
    if wishes.stacks is not None:
        raise ConfigError("stacks=: not with a pipeline: stream that component by itself")
    given = dict(wishes.model_options)
    trusted = given.pop("trust_remote_code", False)
    cls = pipeline_class(cls, folder)
    check_given(cls, given)
    own = wishes._replace(model_options={"trust_remote_code": trusted})
    streamed: dict[str, Prepared] = {}
    dtypes: dict[str, torch.dtype] = {}
    models = models_of(cls, folder, given)
    for name, (library, kind) in models.items():
        with _naming(name):
            net, manifest = build_model(folder / name, kind, options, own)
            sequences = _worth_streaming(net)
            if sequences:
                # A text encoder runs once a picture, a denoiser once a step.
                some = options if library == LIBRARIES[0] else with_one_slot(options)
                streamed[name] = prepare(net, manifest, sequences, some, own)
            elif isinstance(found := getattr(net, "dtype", None), torch.dtype):
                dtypes[name] = found
    if not streamed:
        raise ConfigError(
            f"{folder}: no component of {cls.__name__} has enough blocks to stream: load it by "
            "from_pretrained"
        )
    order = sorted(streamed, key=lambda n: (LIBRARIES.index(models[n][0]), -streamed[n].nbytes))
    given |= {name: model.net for name, model in streamed.items()}
    pipe = _load(cls, folder, given, dtypes, wishes)
    return _start(pipe, {name: streamed[name] for name in order}, options, reserve)


def _load(
    cls: Any,
    folder: Path,
    given: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    wishes: Wishes,
) -> Any:
    """The pipeline as its own class makes it, in host memory. ConfigError if that fails."""
    import diffusers.utils

    word = "dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype"
    loading: dict[str, Any] = {word: {"default": wishes.dtype or torch.float32, **dtypes}}
    if wishes.model_options.get("trust_remote_code"):
        loading["trust_remote_code"] = True
    try:
        return cls.from_pretrained(str(folder), **given, **loading)
    except Exception as error:
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise ConfigError(f"{folder}: {cls.__name__} cannot be made of it: {reason}") from error


def _start(pipe: Any, streamed: Mapping[str, Prepared], options: Options, reserve: int) -> Any:
    """Have what streams stream, the first of it filling the budget first, and what does not be on
    the first device."""
    resident = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and name not in streamed and not _streams(part)
    }
    nbytes = {name: _nbytes(part) for name, part in resident.items()}
    open_models([*streamed.values()], reserve, sum(nbytes.values()))
    nets: dict[str, Any] = {name: model.net for name, model in streamed.items()}
    streamers = {name: net.layer_streamer for name, net in nets.items()}
    handle = PipelineStreamer(streamers, nbytes, reserve)
    try:
        device = open_devices(options.get("device"))[0].torch_device
        for part in resident.values():
            part.to(device)
        refuse(pipe, nets)
        let_adapters_load(pipe, nets)
    except BaseException:
        handle.close()
        raise
    pipe.layer_streamer = handle
    return pipe


def _worth_streaming(net: nn.Module) -> Sequences:
    """The sequences that take less device memory streamed than resident; none if it has none.

    Where an outer list is none of them (the few levels of a UNet), those within it may be.
    """
    without: set[str] = set()
    while True:
        try:
            stacks = find_stacks(net, without=without)
        except ConfigError:
            return {}
        found = sequences_of(stacks)
        large = {b.name for blocks in found.values() if _is_large(blocks) for b in blocks}
        small = {stack.name for stack in stacks if stack.blocks[0].name not in large}
        if not small:
            return found
        without |= small


def _is_large(blocks: Sequence[Block]) -> bool:
    sizes = [_nbytes(block.module) for block in blocks]
    return sum(sizes) > SLOTS * max(sizes)


def _nbytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _streams(part: nn.Module) -> bool:
    return "layer_streamer" in vars(part)


@contextmanager
def _naming(component: str) -> Iterator[None]:
    """Errors begin with the component's name, those of its own library as a ConfigError."""
    try:
        yield
    except StreamerError as error:
        error.args = (f"{component}: {error}",)
        raise
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise ConfigError(f"{component}: cannot be made: {reason}") from error
