"""LayerStreamer: opens a checkpoint, runs passes over its layers, closes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, Unpack

import torch

from .assembly import assemble, read_headers
from .checkpoint.manifest import Manifest, manifest_from_tensor_info
from .devices.accelerator import open_device, open_devices
from .errors import ClosedError
from .passes.caller import Caller
from .passes.claims import Claims
from .passes.expert_report import ExpertReport
from .passes.expert_store import ExpertStore
from .passes.inputs import LayerFn
from .passes.statics import sum_by_device
from .passes.sweep import Opened, Sweep, led_pass, run_layers, sweep
from .planning.options import DeviceName, MoreOptions, Options, check_names, shows
from .planning.plan import Plan
from .planning.settings import Count, Settings, read_count
from .transport.memory import MemoryUse
from .transport.pipeline import Pipeline
from .transport.stage import Heading
from .transport.stats import PassReport
from .transport.tasks import noted_on

X = TypeVar("X")


class LayerStreamer:
    """Streams a checkpoint's layers, block by block, through bounded memory to a device.

    Construction opens the files, allocates every slot and starts the threads; leaving the ``with``
    block (or :meth:`close`) returns all of it. A streamer that nobody holds, neither itself nor a
    :meth:`sweep` of it, or that is alive when the interpreter exits, closes itself.

    Thread rules: one pass at a time, on any thread; all else from any thread. Errors, of which
    StreamerError is the root, are raised in the pass that needs the layer, after which the streamer
    is ready for the next pass. In a forked child, and after ``close``, use is a ClosedError.

    Options are listed at :meth:`from_checkpoint`.
    """

    @shows(MoreOptions)
    def __init__(  # noqa: PLR0913, PLR0917 - the published constructor
        self,
        model_dir: str | Path,
        tensor_info: Mapping[str, tuple[str, int, Sequence[int]]],
        shard_offsets: Mapping[str, int],
        block_keys: Sequence[str],
        block_sizes: Mapping[str, int],
        dtype: torch.dtype,
        num_layers: int,
        n_gpu: int | None = None,
        n_cpu_pinned: Count = "default",
        n_cpu: Count = "default",
        batch_gpu: int | None = None,
        batch_cpu_pinned: int | None = None,
        batch_cpu: int | None = None,
        track_progress: bool = True,
        **options: Unpack[MoreOptions],
    ) -> None:
        """Stream ``model.layers.{i}.{key}`` for every key of ``block_keys``, i < ``num_layers``.

        ``tensor_info``: tensor name -> (shard file name, byte offset in the shard's data section,
        shape). ``shard_offsets``: shard -> byte offset of its data section. ``block_sizes``: key
        -> element count. ``dtype``: the stored dtype, nothing is cast. ``n_cpu_pinned``, ``n_cpu``:
        here None skips the stage, as 0 does. Raises CheckpointError, ConfigError.
        """
        check_names(options, MoreOptions)
        manifest = manifest_from_tensor_info(
            model_dir, tensor_info, shard_offsets, block_keys, block_sizes, dtype, num_layers
        )
        self._open(manifest, Settings(
            n_gpu=n_gpu, n_cpu_pinned=read_count(n_cpu_pinned), n_cpu=read_count(n_cpu),
            batch_gpu=batch_gpu, batch_cpu_pinned=batch_cpu_pinned, batch_cpu=batch_cpu,
            track_progress=track_progress, **options,
        ))  # fmt: skip

    @classmethod
    @shows(Options)
    def from_checkpoint(
        cls, path: str | Path | Manifest, **options: Unpack[Options]
    ) -> LayerStreamer:
        """Open a safetensors directory or file, a GGUF file, or what read_manifest found in one.

        None is the default of every option. Raises CheckpointError, ConfigError.
        """
        settings = Settings(**options)
        self = cls.__new__(cls)
        self._open(read_headers(path, settings.asked["layer_pattern"]), settings)
        return self

    def _open(self, manifest: Manifest, settings: Settings) -> None:
        self.manifest, self._devices = manifest, open_devices(settings.asked["device"])
        pipeline, statics, experts, self._listener = assemble(manifest, self._devices, settings)
        # Before the threads start: from here on, whatever comes, what is open gets closed.
        self._close_pipeline = weakref.finalize(self, pipeline.close_unheld)
        self._plan, self._memory, self._sizes = pipeline.plan, pipeline.memory, statics.sizes
        self._last_pass: PassReport | None = None
        self._last_experts: ExpertReport | None = None
        show = bool(settings.asked["track_progress"])
        self._parts: Opened | None = Opened(
            pipeline, Caller(pipeline, experts), statics, experts, Claims(), show
        )
        pipeline.start()

    @property
    def plan(self) -> Plan:
        """Where each layer lives, how it is read, predicted seconds a pass; also after close."""
        return replace(self._plan, static_bytes=sum_by_device(self._sizes))

    @property
    def memory(self) -> MemoryUse:
        """Bytes that slots, resident layers and static tensors take; after close: took."""
        return self._memory.with_statics(sum_by_device(self._sizes))

    @property
    def read_modes(self) -> dict[Path, str]:
        """By file, how it is read: "direct" where the file system allows it, else "buffered"."""
        return self._opened().pipeline.files.read_modes

    @property
    def device(self) -> torch.device:
        """Where results are returned, and layers are handed out if it is the only one."""
        return self._devices[0].torch_device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where layers are handed out: the i-th of a pass at i modulo their number."""
        return tuple(device.torch_device for device in self._devices)

    @property
    def num_layers(self) -> int:
        """Layers of the checkpoint, streamed or not; tail steps are numbered from here on."""
        return self.manifest.num_layers

    @property
    def num_steps(self) -> int:
        """Hand-outs of a pass: layers and tail steps."""
        return len(self._plan.tiers)

    @property
    def closed(self) -> bool:
        """True after ``close``. Thread rules: any thread."""
        return self._parts is None

    @property
    def last_pass(self) -> PassReport | None:
        """Where the time of the last finished pass went; None before the first.

        Waits until the device has done that pass: the only wait that measuring costs. It can be
        had after ``close``, too. ClosedError in a forked child.
        """
        parts = self._parts
        if parts is None:
            return self._last_pass
        parts.pipeline.check_process()
        return parts.caller.report()

    @property
    def last_experts(self) -> ExpertReport | None:
        """What became of the experts that the last finished pass asked for, also after ``close``;
        None without ``experts="demand"``."""
        parts = self._parts
        if parts is None:
            return self._last_experts
        return None if parts.experts is None else parts.experts.last_pass

    @property
    def experts_stay(self) -> bool:
        """True: with ``experts="demand"``, ``weights.experts.all_there`` has brought all experts
        of all layers, and they are where it has said. False after an interrupt, until it has told
        anew."""
        parts = self._parts
        return parts is not None and parts.experts is not None and parts.experts.all_filled

    @property
    def most_on_device(self) -> int:
        """Of how many ids the device can itself bring experts to slots; 0: it cannot, as without
        Triton, or page-locked memory for all. The first look takes a moment."""
        store = self._opened().experts
        return 0 if store is None or store.lead is None else store.lead.most_ids

    @contextmanager
    def experts_on_device(self) -> Iterator[None]:
        """A pass without hand-outs: what is launched in here, as such or as a CUDA graph, may have
        ``load_on_device`` of experts of an earlier one. Raises as a pass does; StreamerError where
        ``most_on_device`` is 0."""
        with led_pass(self._opened()):
            yield

    def run_pass(self, x: X, layer_fn: LayerFn, *, on_host: bool = True) -> X:
        """One pass: ``x = layer_fn(x, weights, layer_idx)`` for every layer, in order.

        Tensors in ``x`` (also in nested tuples, lists and dicts) are moved to the layer's device.
        ``weights`` maps each tensor's name without the layer's prefix to a tensor of the
        manifest's shape and dtype; they are views of a slot and gone when ``layer_fn`` has
        returned, by when all work that reads them must be ordered before the current stream. With
        ``experts="demand"``, ``weights.experts`` brings those of the layer (None where it has
        none). Those of a layer that is resident on the device (``plan.tiers``) stay as they are,
        the same tensors at the same addresses in every pass, until ``close``. ``on_host``: those of
        ``host_layers`` are on the CPU, and ``x`` with them; False: they are streamed as others are.
        Raises what ``layer_fn`` raises, or the error of the layer that could not be streamed.
        """
        result: X = run_layers(self._opened(), self, x, layer_fn, Heading(on_host=on_host))
        return result

    def sweep(self, *, back: bool = False, turns: bool = False, on_host: bool = True) -> Sweep:
        """One pass as a loop: yields (layer_idx, weights) for every layer, in order.

        ``back``: from the last to the first. ``turns``: the next pass will go the other way, and
        finds what lies in slots by then; to be wrong costs time. What :meth:`run_pass` says of
        weights, and of ``on_host``, holds until the loop advances; ``x`` is yours to move. The
        iterator keeps the streamer alive. Leaving the loop early ends the pass. A newer pass on the
        same thread supersedes it: its next advance raises SupersededError.
        """
        heading = Heading(back, turns, on_host)
        return sweep(self._opened(), self, guarded=False, heading=heading)

    def load_static(self, name: str, device: DeviceName | None = None) -> torch.Tensor:
        """One tensor on a device for good (outside the slots), cast as the layers are.

        ``device``: one that torch has; None: :attr:`device`. The same tensor each time for a name
        and a device, valid also after ``close``; its bytes count in :attr:`memory` and
        :attr:`plan`. Raises CheckpointError, ConfigError, ReadError.
        """
        statics = self._opened().statics
        where = self._devices[0] if device is None else open_device(device)
        return statics.load(name, where)

    def host_tensor(self, name: str) -> torch.Tensor:
        """A host view of one tensor as stored, over the file's own pages: for embedding rows.

        Read-only by contract: a write changes a private copy of the page. It stays valid after
        close; a file that is truncated while it is mapped kills the process that touches it.
        """
        return self._opened().statics.view(name)

    def close(self) -> None:
        """Stop the threads and return all memory and file descriptors. Idempotent, any thread.

        A pass that is under way on another thread raises ClosedError.
        """
        parts = getattr(self, "_parts", None)
        if parts is None:
            return  # closed, or construction failed
        parts.pipeline.close()
        try:
            if not parts.pipeline.forked:
                self._last_pass = parts.caller.report()
                self._last_experts = self.last_experts
        finally:
            self._parts = None
            # Detached last: it holds the pipeline, and until here it is what an exit would call.
            self._close_pipeline.detach()

    def __enter__(self) -> LayerStreamer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with noted_on(error):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.num_layers} layers on {self.device}"
        return f"<LayerStreamer {self.manifest.path} ({state})>"

    def _opened(self) -> Opened:
        parts = self._parts
        if parts is None:
            raise ClosedError("the streamer is closed")
        parts.pipeline.check_process()
        return parts


def pipeline_of(streamer: LayerStreamer) -> Pipeline:
    """What serves it, for those who measure what the hardware alone needs. Raises ClosedError."""
    return streamer._opened().pipeline


def store_of(streamer: LayerStreamer) -> ExpertStore | None:
    """Where experts are that are brought on demand; None without. Raises ClosedError."""
    return streamer._opened().experts


def keys_of(streamer: LayerStreamer) -> list[tuple[str, ...]]:
    """By layer of the checkpoint, the keys that are handed out: experts that are brought on demand
    are none of them. Raises ClosedError."""
    store = store_of(streamer)
    experts = {} if store is None else {i: found.banks for i, found in store.layers.items()}
    layers = enumerate(streamer.manifest.layers)
    return [tuple(key for key in x.tensors if key not in experts.get(i, ())) for i, x in layers]
