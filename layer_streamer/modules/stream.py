"""stream(): a model that keeps its class, its forward and its hooks, and whose weights stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack, overload

import torch
from torch import nn

from ..checkpoint.formats import read_tensors
from ..checkpoint.manifest import Manifest
from ..devices.accelerator import open_devices
from ..errors import ConfigError
from ..planning.options import Options, check_names
from ..streamer import LayerStreamer
from .blocks import Block, find_stacks, group_stacks
from .diffuser import build_diffuser, is_diffuser
from .ends.choice import Embeddings, Heads, Outside, Wishes, choose, take_away
from .ends.matrix import Matrix, find_ends
from .handle import ModuleStreamer
from .hub import build, class_of, is_hub_folder, local_folder, make_buffers
from .naming.names import Names, is_hub_model, name_tensors
from .naming.quantized import prepare_quantized
from .outside import check_complete, load_outside, outside_of, share_tied, take_dtypes
from .refusals import leave_states_without_values, note_lack_of_memory, refuse
from .resident import AnyRunner, give_weights
from .sequence import by_block, made_nbytes, manifest_of, nbytes_of
from .share import open_all, part_of, reserve_of

M = TypeVar("M", bound=nn.Module)
OF_LAYERS = ("layers", "tail", "layer_pattern", "on_copy")
"""Options of a streamer that a model's own forward has no use for."""


@overload
def stream(
    model: str | Path,
    *,
    cls: type[M],
    model_options: Mapping[str, Any] | None = ...,
    trust_remote_code: bool = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> M: ...
@overload
def stream(
    model: str | Path,
    *,
    cls: None = ...,
    model_options: Mapping[str, Any] | None = ...,
    trust_remote_code: bool = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> Any: ...
@overload
def stream(
    model: M,
    path: str | Path,
    *,
    key_mapping: Mapping[str, str] | None = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> M: ...
def stream(  # noqa: PLR0913 - three ways to say which model
    model: str | Path | nn.Module,
    path: str | Path | None = None,
    *,
    cls: Any = None,
    model_options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    stacks: Sequence[str] | None = None,
    embeddings: Embeddings = "auto",
    head: Heads = "auto",
    strict: bool = False,
    **options: Unpack[Options],
) -> Any:
    """A model whose blocks get their weights while its own forward runs.

    ``model``: a folder of transformers', or the name of a repository; the class is the one that its
    config.json names, or ``cls``, made with ``model_options`` (``attn_implementation`` and the
    like). Or the folder of one of diffusers' models (a pipeline's "transformer"). Or an
    nn.Module on the meta device, and ``path``, a safetensors folder or file (GGUF, too), whose
    names are the module's, or become so by ``key_mapping`` (regular expressions and what replaces
    them). ``stacks``: the blocks, as patterns ("blocks.{i}.") or names, where they are not found by
    themselves. ``embeddings``: "host" takes their rows from host memory; "auto" those of the large
    ones (64 MiB and more) if the budget does not hold the whole model. ``head``: "stream" has the
    output head's rows streamed, some at a time; "auto" if the budget has no room for it.
    ``strict``: weights used outside of their block's forward raise an error by name.

    Returns the model, in eval mode, without gradients; ``.layer_streamer`` is its
    :class:`ModuleStreamer`. ``options`` are those of :meth:`LayerStreamer.from_checkpoint`.
    ``device_budget`` counts weights: slots, resident blocks and what is outside of blocks; on a GPU
    its default is "auto", what is free less ``reserve_bytes`` (2 GiB if that is not said) for
    activations and caches, which nobody can know. ``dtype``: None is the checkpoint's.

    Errors: CheckpointError for weights that are missing or do not fit; ConfigError for what cannot
    stream, and for budgets; nothing is left open.
    """
    wishes = _Wishes(strict, Wishes(embeddings, head))
    _check(options, wishes)
    dtype = options.pop("dtype", None)
    if isinstance(model, nn.Module):
        if path is None:
            raise ConfigError("stream(module, path): say where the checkpoint is")
        net, manifest = model.eval().requires_grad_(False), read_tensors(path)
    else:
        asked = {"trust_remote_code": trust_remote_code, **(model_options or {})}
        net, manifest = _from_folder(local_folder(model), cls, dtype, asked)
        prepare_quantized(net, open_devices(options.get("device"))[0].torch_device)
    names = name_tensors(net, manifest, key_mapping=key_mapping)
    check_complete(names, manifest.path)
    return _open(net, manifest, names, _sequences(net, stacks), options, wishes)


class _Wishes(NamedTuple):
    """What else was asked for."""

    strict: bool
    ends: Wishes


def _check(options: Options, wishes: _Wishes) -> None:
    """ConfigError, TypeError for what cannot be asked for."""
    check_names(options, Options)
    for name in OF_LAYERS:
        if options.get(name) is not None:
            raise ConfigError(f"{name}=: not with a module, whose forward has its own order")
    wishes.ends.check()


def _from_folder(
    folder: Path, cls: Any, dtype: torch.dtype | None, options: Mapping[str, Any]
) -> tuple[nn.Module, Manifest]:
    """The model of transformers or diffusers whose folder it is, on meta, and its checkpoint."""
    if not is_hub_folder(folder):
        raise ConfigError(f"{folder}: no config.json: stream(module, path) takes a module")
    manifest = read_tensors(folder)
    if is_diffuser(folder):
        return build_diffuser(cls, folder, manifest.static, dtype), manifest
    cls = class_of(folder) if cls is None else cls
    return build(cls, folder, manifest.static, dtype, options), manifest


def _sequences(net: nn.Module, stacks: Sequence[str] | None) -> dict[str, tuple[Block, ...]]:
    """The blocks of each sequence by its name."""
    sequences = group_stacks(find_stacks(net, stacks))
    return {blocks[0].name.rpartition(".")[0]: blocks for blocks in sequences}


def _open(
    net: nn.Module,
    manifest: Manifest,
    names: Names,
    sequences: Mapping[str, tuple[Block, ...]],
    options: Options,
    wishes: _Wishes,
) -> nn.Module:
    blocks = [block for some in sequences.values() for block in some]
    outside = outside_of(net, names, blocks)
    static = {name: names.recipes[name] for name in outside}
    inside = by_block(blocks, {n: r for n, r in names.recipes.items() if n not in static})
    sizes = {key: nbytes_of(inside[b.name] for b in some) for key, some in sequences.items()}
    order = sorted(sequences, key=sizes.__getitem__)[::-1]
    take_dtypes(net, names.recipes)
    _place_buffers(net, names, open_devices(options.get("device"))[0].torch_device)
    reserve = reserve_of(options.pop("reserve_bytes", None), options.get("device_budget"))
    parts = {
        name: part_of(manifest_of(manifest, sequences[name], inside, {} if i else static), options)
        for i, name in enumerate(order)
    }
    beside = Outside(manifest, static, made_nbytes(inside.values()))
    ends = find_ends(net, names, outside, blocks)
    division = choose(parts, beside, ends, wishes.ends, options, reserve)
    some = open_all([*division.parts.values()], options, division.budget, division.kept)
    streamers = dict(zip(division.parts, some, strict=True))
    runners: dict[str, AnyRunner] = {}
    try:
        for name in order:
            streamer = streamers[name]
            runners[name] = give_weights(
                streamer, sequences[name], names.recipes, strict=wishes.strict
            )
            leave_states_without_values(sequences[name], runners[name].binder)
        _fill(net, names, streamers, outside, division.away)
        blocks += [matrix.head for matrix in division.away if matrix.head is not None]
        refuse(net, blocks, streamers[order[0]].device)
        note_lack_of_memory(net)
        handle = ModuleStreamer(net, streamers, runners, blocks, division, reserve)
    except BaseException:
        for runner in runners.values():
            runner.close()
        for streamer in some:
            streamer.close()
        raise
    net.layer_streamer = handle  # type: ignore[assignment]
    return net


def _fill(
    net: nn.Module,
    names: Names,
    streamers: Mapping[str, LayerStreamer],
    outside: Sequence[str],
    away: Sequence[Matrix],
) -> None:
    """Give what is outside the blocks its values, but for what is not on the device."""
    first = next(iter(streamers.values()))
    gone = {matrix.name for matrix in away}
    load_outside(net, first, names.recipes, [name for name in outside if name not in gone])
    take_away(away, first, streamers)
    share_tied(net, names.tied)


def _place_buffers(net: nn.Module, names: Names, device: torch.device) -> None:
    """Buffers that no checkpoint has are made, or moved where they are real."""
    if is_hub_model(net):
        make_buffers(net, names.made, device)
        return
    for module in net.modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                raise ConfigError(
                    f"{type(module).__name__}: its buffer {leaf!r} is on meta, and no checkpoint "
                    "has it: make the module with real buffers"
                )
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
