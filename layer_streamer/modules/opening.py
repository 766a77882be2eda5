"""From a model on meta and its checkpoint to one that streams: looked through first, by headers
alone, and opened when it is known what all of them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint.formats import read_tensors
from ..checkpoint.manifest import FrozenMapping, Manifest
from ..devices.accelerator import open_devices
from ..errors import ConfigError
from ..planning.options import Options
from ..streamer import LayerStreamer
from .blocks import Block, Stack, group_stacks
from .diffuser import build_diffuser, config_of_file, is_diffuser, weights_of
from .ends import choice
from .ends.choice import Division, Outside, Undivided, choose, take_away
from .ends.matrix import find_ends
from .handle import ModuleStreamer
from .hub import build, class_of, is_hub_folder, make_buffers, runs_once
from .mixtures.lending import lend_experts
from .mixtures.places import all_whole, check_has_experts, options_of
from .naming.names import Names, is_hub_model, name_tensors
from .naming.quantized import prepare_quantized
from .outside import check_complete, load_outside, outside_of, share_tied, take_dtypes
from .refusals import leave_states_without_values, note_lack_of_memory, refuse
from .resident import AnyRunner, give_weights
from .sequence import by_block, made_nbytes, manifest_of, nbytes_of
from .share import Amount, Part, budget_of, open_all, part_of, total

Sequences = Mapping[str, tuple[Block, ...]]
"""The blocks of each sequence, by the name of the first list of them."""


class Wishes(NamedTuple):
    """What is asked for beside the options of a streamer."""

    dtype: torch.dtype | None = None
    model_options: Mapping[str, Any] = FrozenMapping({})
    key_mapping: Mapping[str, str] | None = None
    stacks: Sequence[str] | None = None
    ends: choice.Wishes = choice.Wishes()
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model of which headers were read, and nothing was opened."""

    net: nn.Module
    names: Names
    sequences: Sequences
    """The largest first."""
    undivided: Undivided
    """What of it may be where."""
    nbytes: int
    """Bytes of its blocks."""
    wishes: Wishes


def build_model(
    folder: Path, cls: Any, options: Options, wishes: Wishes
) -> tuple[nn.Module, Manifest]:
    """The model of transformers or diffusers whose folder it is, on meta, and its checkpoint.

    A single file is one of diffusers' ``cls``, which says what else it needs.
    """
    if folder.is_file() and hasattr(cls, "load_config"):
        manifest = read_tensors(folder)
        config = config_of_file(folder, wishes.model_options)
        return build_diffuser(cls, config, manifest.static, wishes.dtype), manifest
    if not is_hub_folder(folder):
        raise ConfigError(f"{folder}: no config.json: stream(module, path) takes a module")
    if is_diffuser(folder):
        manifest = read_tensors(weights_of(folder))
        net = build_diffuser(cls, folder, manifest.static, wishes.dtype)
    else:
        manifest = read_tensors(folder)
        cls = class_of(folder) if cls is None else cls
        net = build(cls, folder, manifest.static, wishes.dtype, wishes.model_options)
    prepare_quantized(net, open_devices(options.get("device"))[0].torch_device)
    return net, manifest


def sequences_of(stacks: Sequence[Stack]) -> Sequences:
    """What one pass goes through in order, for each of them."""
    return {blocks[0].name.rpartition(".")[0]: blocks for blocks in group_stacks(stacks)}


def with_one_slot(options: Options) -> Options:
    """The same, where nobody says how many slots: for what runs once before others run many times.

    More slots would be taken from those, for the sake of a few hundredths of a second.
    """
    if options.get("n_gpu") is not None:
        return options
    return Options(**{**options, "n_gpu": 0})


def prepare(
    net: nn.Module, manifest: Manifest, sequences: Sequences, options: Options, wishes: Wishes
) -> Prepared:
    """What the model's sequences stream and what it takes beside them; buffers are made.

    CheckpointError for parameters that the checkpoint lacks, ConfigError for experts that cannot be
    brought on demand.
    """
    blocks = [block for some in sequences.values() for block in some]
    check_has_experts(net, blocks, options)
    names = name_tensors(net, manifest, key_mapping=wishes.key_mapping)
    check_complete(names, manifest.path)
    outside = outside_of(net, names, blocks)
    static = {name: names.recipes[name] for name in outside}
    inside = by_block(blocks, {n: r for n, r in names.recipes.items() if n not in static})
    sizes = {key: nbytes_of(inside[b.name] for b in some) for key, some in sequences.items()}
    ordered = {key: sequences[key] for key in sorted(sequences, key=sizes.__getitem__)[::-1]}
    take_dtypes(net, names.recipes)
    _place_buffers(net, names, open_devices(options.get("device"))[0].torch_device)
    parts: dict[str, Part] = {}
    for key, some in ordered.items():
        asked = with_one_slot(options) if runs_once(net, some[0].module) else options
        own = manifest_of(manifest, some, inside, {} if parts else static)
        parts[key] = part_of(own, options_of(asked, some, own, names.recipes))
    undivided = Undivided(
        parts=parts,
        outside=Outside(manifest, static, made_nbytes(inside.values())),
        ends=find_ends(net, names, outside, blocks),
        wishes=wishes.ends,
        options=all_whole(options),
    )
    return Prepared(net, names, ordered, undivided, sum(sizes.values()), wishes)


def open_models(models: Sequence[Prepared], reserve: int, kept_nbytes: int = 0) -> None:
    """Have the models stream, all within one ``device_budget``, which the first of them fill first.

    ``reserve`` bytes of it are the caller's, ``kept_nbytes`` are taken on the first device by what
    is none of theirs. Each gets its ``layer_streamer``. Errors: ConfigError for a budget that does
    not hold the slots; whatever opening raises. None is left open.
    """
    first = next(iter(models[0].undivided.parts.values()))
    budget, zeros = budget_of(first, reserve), [0] * (len(first.whole) - 1)
    kept: Amount = (kept_nbytes, *zeros)
    divisions = choose([model.undivided for model in models], budget, kept)
    parts = [part for division in divisions for part in division.parts.values()]
    opened = open_all(parts, budget, total([division.kept for division in divisions], kept))
    rest = iter(opened)
    try:
        for model, division in zip(models, divisions, strict=True):
            _start(model, division, dict(zip(division.parts, rest, strict=False)), reserve)
    except BaseException:
        for model in models:
            handle = model.net.__dict__.get("layer_streamer")
            if handle is not None:
                handle.close()
        for streamer in opened:
            streamer.close()
        raise


def _start(
    model: Prepared, division: Division, streamers: Mapping[str, LayerStreamer], reserve: int
) -> None:
    """Give the model its weights, and its blocks their hooks."""
    net, recipes, away = model.net, model.names.recipes, division.away
    blocks = [block for some in model.sequences.values() for block in some]
    blocks += [matrix.head for matrix in away if matrix.head is not None]
    runners: dict[str, AnyRunner] = {}
    try:
        for name, some in model.sequences.items():
            runners[name] = give_weights(streamers[name], some, recipes, strict=model.wishes.strict)
            leave_states_without_values(some, runners[name].binder)
            lend_experts(some, runners[name], streamers[name])
        first, gone = next(iter(streamers.values())), {matrix.name for matrix in away}
        there = [name for name in model.undivided.outside.recipes if name not in gone]
        load_outside(net, first, recipes, there)
        take_away(away, first, streamers)
        share_tied(net, model.names.tied)
        refuse(net, blocks, first.device)
        note_lack_of_memory(net)
        handle = ModuleStreamer(net, streamers, runners, blocks, division, reserve)
    except BaseException:
        for runner in runners.values():
            runner.close()
        raise
    net.layer_streamer = handle  # type: ignore[assignment]


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
