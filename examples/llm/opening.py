"""What a StreamingEngine is opened from: the checkpoint's description and the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layer_streamer import CheckpointError, LayerStreamer, Manifest, read_manifest

from .adapters.reading import read_adapter
from .generation_config import read_generation_config
from .host_kernels.products import prepare
from .hub import find_model
from .kernels.triton_support import triton_serves
from .kv.blocks import BLOCK, round_up
from .kv.cache import KVCache, KVLayout
from .memory.footprint import Footprint, Needs, loaded_nbytes
from .memory.memory_plan import MemoryPlan
from .memory.placing import Named, choose_devices, choose_dtype, devices_of
from .memory.wishes import Wishes
from .metadata import load_config, load_tokenizer, metadata_directory, refuse_by_config
from .models.config import ModelConfig
from .models.names import WeightNames, known_layers, used_tensors, weight_names
from .on_host.auto import plan_with_host_layers
from .on_host.side import HostSide
from .passes.chunking import Chunking
from .passes.decode import MOST_ROWS, MOST_ROWS_STREAMED, captured_rows
from .passes.runner import Runner
from .passes.ways import obstacle
from .text.sampling_options import Sampling
from .threads import leave_a_core
from .weights.dequant import Unpacker

NESTED_LAYERS = (
    "language_model.model.layers.{i}.",
    "model.language_model.layers.{i}.",
    "model.language_model.model.layers.{i}.",
    "language_model.layers.{i}.",
    "model.text_model.layers.{i}.",
    "thinker.model.layers.{i}.",
    "layers.{i}.",
)
"""Prefixes of a language model's layers that are tried after the usual ones."""
ADAPTER = "adapter_config.json"

DEFAULT_LENGTH = 4096
"""Tokens of a row, if nobody says how many."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine is to hold. ValueError for a number that makes no sense."""

    max_length: int | None = None
    kv_tokens: int | None = None
    max_batch: int = 8
    _: KW_ONLY
    kv_int8: bool = False
    drafted: int = 0
    reproducible: bool = False

    def __post_init__(self) -> None:
        for name in ("max_length", "kv_tokens", "max_batch"):
            at_least_one(name, getattr(self, name))

    def length(self, config: ModelConfig) -> int:
        """The most tokens of one row."""
        context = config.max_positions
        if self.max_length is None:
            return min(DEFAULT_LENGTH, context)
        if self.max_length > context:
            raise ValueError(f"max_length={self.max_length}: the model's context is {context}")
        return self.max_length

    def tokens(self, config: ModelConfig) -> int:
        """Tokens of all rows together."""
        length = self.length(config)
        if self.kv_tokens is not None and self.kv_tokens < length:
            raise ValueError(f"kv_tokens={self.kv_tokens}: must be at least max_length={length}")
        return round_up(self.kv_tokens or length)


def at_least_one(name: str, value: object) -> None:
    """ValueError unless an option is None or a count."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r}: must be an int of at least 1")


@dataclass(frozen=True)
class Model:
    """A checkpoint that the engine can compute, as its headers describe it."""

    path: Path
    manifest: Manifest
    directory: Path
    """Of its config and tokenizer."""
    config: ModelConfig
    names: WeightNames

    @classmethod
    def read(
        cls, path: str | Path, notify: Callable[[str], None], layer_pattern: str | None = None
    ) -> Model:
        """Read what describes a model, which is downloaded if it is not here.

        ``layer_pattern`` is that of ``read_manifest``. Errors are ValueErrors, OSErrors,
        ImportErrors (a package to install), or those of the streamer.
        """
        path = find_model(path)
        manifest = _read_manifest(path, layer_pattern)
        directory = metadata_directory(manifest, notify)
        config = load_config(directory)
        manifest, left_out = known_layers(manifest, config)
        names = weight_names(manifest, config)
        if (directory / ADAPTER).is_file():
            left_out.append(f"{ADAPTER} is not used unless adapter= (--adapter) names its folder")
        for note in (*config.notes, *left_out, *names.notes):
            notify(f"{path.name}: {note}")
        return cls(path, used_tensors(manifest, names), directory, config, names)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first needed; ValueError if it has none that can
        be read, ImportError for a package that reads it."""
        found = self._tokenizer
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        """Or the error, which every row of a batch asks for."""
        try:
            return load_tokenizer(self.directory)
        except (ValueError, ImportError) as error:
            return error

    def default_sampling(self, notify: Callable[[str], object]) -> Sampling:
        """How tokens are chosen where nobody says: by the model's generation_config.json, of which
        ``notify`` hears what cannot be used."""
        config = read_generation_config(self.directory)
        for note in config.notes:
            notify(note)
        return config.sampling


def model_of(
    path: str | Path | Model,
    notify: Callable[[str], None],
    options: dict[str, Any],
    adapter: str | Path | None = None,
) -> Model:
    """The model, read unless it has been, beside it an adapter; the one of the streamer's options
    that says how goes."""
    pattern = None if isinstance(path, Model) else options.pop("layer_pattern", None)
    model = path if isinstance(path, Model) else Model.read(path, notify, pattern)
    if adapter is None:
        return model
    folder = Path(adapter).expanduser()
    found, base = read_adapter(folder, model.names, model.config)
    if base and Path(base).name != model.path.name:
        notify(f"{folder}: an adapter of {base}, used with {model.path.name}")
    return replace(model, names=replace(model.names, adapter=found))


def _read_manifest(path: Path, layer_pattern: str | None) -> Manifest:
    """The layers by their pattern, or by one that language models use; errors of ``read_manifest``,
    unless the config has a better reason."""
    try:
        return read_manifest(path, layer_pattern)
    except CheckpointError:
        refuse_by_config(path)
        for pattern in NESTED_LAYERS if layer_pattern is None else ():
            with suppress(CheckpointError):
                return read_manifest(path, pattern)
        raise


def plan_memory(
    model: Model, limits: Limits, wishes: Wishes, dtype: torch.dtype, draft: tuple[int, ...] = ()
) -> tuple[MemoryPlan, Needs]:
    """Where everything will be, of an engine that computes in ``dtype``, beside a ``draft`` of so
    many bytes on each device; ValueError with the least budget that would do."""
    at_least_one("prefill_chunk", wishes.prefill_chunk)
    device, *others = devices_of(wishes.options)
    if limits.reproducible:
        problem = obstacle(device, model.config, limits.length(model.config))
        if problem is not None:
            raise ValueError(f"reproducible=True: {problem}")
    # On "meta", the buffers of a GPU have their sizes but take no memory.
    memory = device if device.type == "cpu" else torch.device("meta")
    kernels = triton_serves(device)
    names, cast = model.names, wishes.options["dtype"]
    scratch = Unpacker(memory, dtype, names.widest(dtype, cast), kernels=kernels)
    on_demand = wishes.options.get("experts") == "demand"
    most, streamed = (
        min(captured_rows(device, model.config, n, on_demand=on_demand), limits.max_batch)
        if not limits.reproducible
        else 0
        for n in (MOST_ROWS, MOST_ROWS_STREAMED)
    )
    statics = [*names.head_parts, names.norm, *([names.rope_factors] if names.rope_factors else [])]
    static_nbytes = sum(model.manifest.static[name].nbytes for name in statics)
    if names.adapter is not None:
        static_nbytes += names.adapter.numel * dtype.itemsize
    head = 0 if wishes.options["tail"] else loaded_nbytes(model.manifest.static[names.head], cast)
    needs = Needs(
        kv_tokens=limits.tokens(model.config),
        max_batch=limits.max_batch,
        drafted=limits.drafted,
        dtype=dtype,
        device_type=device.type,
        int8=limits.kv_int8,
        packed_nbytes=scratch.nbytes,
        static_nbytes=static_nbytes,
        head_nbytes=head,
        captured_rows=0 if others else most,  # no graph spans devices
        captured_rows_streamed=streamed,
        captured_part=BLOCK if limits.max_batch > 1 else 0,
        reproducible=limits.reproducible,
        draft_nbytes=draft,
    )
    plan = plan_with_host_layers(model, Footprint(model.config, needs), wishes)
    if plan.streamer.host_layers and (limits.reproducible or limits.kv_int8):
        name = "reproducible" if limits.reproducible else "kv_int8"
        raise ValueError(f"{name}=True: does not go with host_layers")
    return plan, needs


def place(
    model: Model,
    device: Named | Sequence[Named] | None,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
    *,
    loads_head: bool = False,
) -> tuple[dict[str, Any], torch.dtype]:
    """The streamer's options with what the engine needs, and the dtype that it computes in.
    ``loads_head``: the output head stays on the device. ValueError for more devices than layers."""
    chosen, layers = choose_devices(device), model.config.num_layers
    if len(chosen) > layers:
        raise ValueError(f"device: {len(chosen)} of them for {layers} layers: name no more of them")
    dtype = choose_dtype(chosen, dtype)
    where = chosen[0] if len(chosen) == 1 else list(chosen)
    cast = model.names.cast(chosen[0], dtype)
    own = {"device": where, "dtype": cast, "tail": [] if loads_head else [model.names.head]}
    for name in options:
        if name == "layer_pattern":
            raise ValueError("layer_pattern: belongs to Model.read, which finds the layers")
        if name in (*own, "on_copy", "layers"):
            raise ValueError(f"{name}: is the engine's own")
    return dict(options) | own, dtype


def open_runner(model: Model, plan: MemoryPlan, needs: Needs) -> Runner:
    """Allocate the cache, open the streamer; after an error nothing is left."""
    devices = devices_of(plan.options)
    if devices[0].type == "cpu":
        leave_a_core()
        prepare()
    layout = KVLayout(
        tokens=plan.kv_tokens,
        max_rows=needs.max_batch,
        dtype=needs.dtype,
        host_layers=plan.host_layers,
        int8=needs.int8,
    )
    kv = KVCache(model.config, layout, devices)
    streamer = None
    try:
        on_copy = kv.host.prefetch if kv.host is not None else None
        streamer = LayerStreamer.from_checkpoint(model.manifest, on_copy=on_copy, **plan.options)
        kv.allocate([slots.count for slots in streamer.plan.placement.device_slots])
        streamed = needs.captured_rows_streamed if plan.captures_layers else 0
        chunking = Chunking(
            plan.chunk,
            group_rows=kv.device.type != "cpu",
            captured_rows=needs.captured_rows if plan.captures else streamed,
            captured_part=min(needs.captured_part, plan.chunk) if plan.captures_layers else 0,
            reproducible=needs.reproducible,
        )
        names = model.names
        if names.adapter is not None:
            names = replace(names, adapter=names.adapter.to(kv.device, needs.dtype))
        runner = Runner(streamer, model.config, names, kv, dtype=needs.dtype, chunking=chunking)
        if streamer.plan.host_layers:
            leave_a_core()
            runner.host = HostSide(runner, streamer)
        return runner
    except BaseException:
        if streamer is not None:
            streamer.close()
        kv.close()
        raise
