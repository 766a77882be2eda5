"""LayerStreamer: opens a checkpoint, runs passes over its layers, closes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .assembly import assemble
from .checkpoint.formats import read_manifest
from .checkpoint.manifest import Manifest, manifest_from_tensor_info
from .devices.accelerator import open_devices
from .errors import ClosedError
from .passes.caller import Caller
from .passes.claims import Turns
from .passes.inputs import move
from .passes.sweep import Parts, Sweep, sweep
from .planning.plan import Plan
from .planning.settings import UNSET, Bytes, DeviceName, OnCopy, ReadMode, Settings, Unset
from .transport.memory import MemoryUse
from .transport.pool import Weights
from .transport.stats import PassReport

X = TypeVar("X")
LayerFn = Callable[[Any, Weights, int], Any]
"""``layer_fn(x, weights, layer_idx) -> x``."""


class LayerStreamer:
    """Streams a checkpoint's layers, block by block, through bounded memory to a device.

    Construction opens the files, allocates every slot and starts the threads; leaving the ``with``
    block (or :meth:`close`) returns all of it. A streamer that is garbage collected, or alive when
    the interpreter exits, closes itself.

    Thread rules: one pass at a time, on any thread; ``close`` from any thread. Errors are raised
    in the pass that needs the layer, after which the streamer is ready for the next pass.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the published constructor
        self,
        model_dir: str | Path,
        tensor_info: Mapping[str, tuple[str, int, Sequence[int]]],
        shard_offsets: Mapping[str, int],
        block_keys: Sequence[str],
        block_sizes: Mapping[str, int],
        dtype: torch.dtype,
        num_layers: int,
        n_gpu: int | Unset = UNSET,
        n_cpu_pinned: int | Unset | None = UNSET,
        n_cpu: int | Unset | None = UNSET,
        batch_gpu: int | None = None,
        batch_cpu_pinned: int | None = None,
        batch_cpu: int | None = None,
        track_progress: bool = True,
        *,
        device: DeviceName | Sequence[DeviceName] | None = None,
        device_budget: Bytes | None = None,
        host_budget: Bytes | None = None,
        reserve_bytes: Bytes = 0,
        read_mode: ReadMode = "auto",
        read_threads: int | None = None,
        read_chunk: int | None = None,
        tail: Sequence[str] = (),
        on_copy: OnCopy | None = None,
    ) -> None:
        """Stream ``model.layers.{i}.{key}`` for every key of ``block_keys``, i < ``num_layers``.

        ``tensor_info``: tensor name -> (shard file name, byte offset in the shard's data section,
        shape). ``shard_offsets``: shard -> byte offset of its data section. ``block_sizes``: key
        -> element count. ``dtype``: the stored dtype, nothing is cast. The other options are those
        of :meth:`from_checkpoint`. Raises CheckpointError, ConfigError.
        """
        manifest = manifest_from_tensor_info(
            model_dir, tensor_info, shard_offsets, block_keys, block_sizes, dtype, num_layers
        )
        settings = Settings(
            device=device, n_gpu=n_gpu, n_cpu_pinned=n_cpu_pinned, n_cpu=n_cpu,
            batch_gpu=batch_gpu, batch_cpu_pinned=batch_cpu_pinned, batch_cpu=batch_cpu,
            device_budget=device_budget, host_budget=host_budget, reserve_bytes=reserve_bytes,
            read_mode=read_mode, read_threads=read_threads, read_chunk=read_chunk, tail=tail,
            on_copy=on_copy, track_progress=track_progress,
        )  # fmt: skip
        self._open(manifest, settings)

    @classmethod
    def from_checkpoint(  # noqa: PLR0913 - every option by name
        cls,
        path: str | Path,
        *,
        device: DeviceName | Sequence[DeviceName] | None = None,
        dtype: torch.dtype | None = None,
        n_gpu: int | Unset = UNSET,
        n_cpu_pinned: int | Unset | None = UNSET,
        n_cpu: int | Unset | None = UNSET,
        batch_gpu: int | None = None,
        batch_cpu_pinned: int | None = None,
        batch_cpu: int | None = None,
        device_budget: Bytes | None = None,
        host_budget: Bytes | None = None,
        reserve_bytes: Bytes = 0,
        read_mode: ReadMode = "auto",
        read_threads: int | None = None,
        read_chunk: int | None = None,
        tail: Sequence[str] = (),
        on_copy: OnCopy | None = None,
        layer_pattern: str | None = None,
        track_progress: bool = False,
    ) -> LayerStreamer:
        """Open a safetensors directory or file, or a GGUF file; its layers are found by name.

        * ``device``: one or several; layer i goes to device i % their number. None: GPU, else CPU.
        * ``dtype``: cast F32, F16 and BF16 tensors to it on the device; None leaves them as stored.
        * ``n_gpu`` (2), ``n_cpu_pinned``, ``n_cpu``: layers that the device, pinned and pageable
          pools hold ahead, beside the one in use; without host pools, a small pinned ring serves.
        * ``batch_gpu``, ``batch_cpu_pinned``, ``batch_cpu``: layers handed on at a time; None: 1.
        * ``device_budget``, ``host_budget``, ``reserve_bytes``, ``read_mode``: docs/concepts.md.
        * ``read_threads`` (None: 8), ``read_chunk`` (None: 1 or 8 MiB): threads, bytes a read.
        * ``tail``: names of tensors to stream after the last layer, split by rows.
        * ``on_copy(layer_idx, stream)``: called on the copier's thread after a layer's copies are
          enqueued on ``stream`` (on the CPU: a stand-in without work), before they count as ready.
        * ``layer_pattern``: prefix of a layer's tensors with ``{i}`` for the index.
        * ``track_progress``: a progress bar over the layers, on stderr.

        Raises CheckpointError for the checkpoint, ConfigError for the options.
        """
        settings = Settings(
            device=device, dtype=dtype, n_gpu=n_gpu, n_cpu_pinned=n_cpu_pinned, n_cpu=n_cpu,
            batch_gpu=batch_gpu, batch_cpu_pinned=batch_cpu_pinned, batch_cpu=batch_cpu,
            device_budget=device_budget, host_budget=host_budget, reserve_bytes=reserve_bytes,
            read_mode=read_mode, read_threads=read_threads, read_chunk=read_chunk, tail=tail,
            on_copy=on_copy, track_progress=track_progress,
        )  # fmt: skip
        self = cls.__new__(cls)
        self._open(read_manifest(path, layer_pattern), settings)
        return self

    def _open(self, manifest: Manifest, settings: Settings) -> None:
        self.manifest = manifest
        self._devices = open_devices(settings.device)
        self._turns = Turns()
        pipeline, statics = assemble(manifest, self._devices, settings)
        # First of all: from here on, whatever comes, what is open gets closed.
        self._close_pipeline = weakref.finalize(self, pipeline.close)
        self._parts: Parts | None = Parts(
            pipeline, Caller(pipeline), statics, self._turns, settings.track_progress
        )
        pipeline.start()

    @property
    def plan(self) -> Plan:
        """Where each layer lives, how it is read, and the predicted seconds a pass."""
        return self.opened().pipeline.plan

    @property
    def read_modes(self) -> dict[Path, str]:
        """By file, how it is read: "direct" where the file system allows it, else "buffered"."""
        return self.opened().pipeline.files.read_modes

    @property
    def device(self) -> torch.device:
        """Where results are returned, and layers are handed out if it is the only one."""
        return self._devices[0].torch_device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where layers are handed out: layer i at i modulo their number."""
        return tuple(device.torch_device for device in self._devices)

    @property
    def num_layers(self) -> int:
        """Layers of the checkpoint; tail steps are numbered from here on."""
        return self.manifest.num_layers

    @property
    def num_steps(self) -> int:
        """Hand-outs of a pass: layers and tail steps."""
        return self.opened().pipeline.schedule.length

    @property
    def memory(self) -> MemoryUse:
        """Bytes that the slots take on the host and on the device; it never grows."""
        return self.opened().pipeline.memory

    @property
    def closed(self) -> bool:
        return self._parts is None

    @property
    def last_pass(self) -> PassReport | None:
        """Where the time of the last finished pass went; None before the first.

        Waits until the device has done that pass: the only wait that measuring costs.
        """
        return self.opened().caller.report()

    def run_pass(self, x: X, layer_fn: LayerFn) -> X:
        """One pass: ``x = layer_fn(x, weights, layer_idx)`` for every layer, in order.

        Tensors in ``x`` (also in nested tuples, lists and dicts) are moved to the layer's device.
        ``weights`` maps each tensor's name without the layer's prefix to a tensor of the
        manifest's shape and dtype; they are views of a slot and gone when ``layer_fn`` has
        returned, by when all work that reads them must be ordered before the current stream.
        Those of a layer that is resident on the device (``plan.tiers``) stay as they are, the same
        tensors at the same addresses in every pass, until ``close``.

        Raises what ``layer_fn`` raises, or the error of the layer that could not be streamed.
        """
        steps = sweep(self.opened(), guarded=True)
        state: Any = x
        try:
            for layer_idx, weights in steps:
                device = self._devices[layer_idx % len(self._devices)]
                state = layer_fn(move(state, device.torch_device), weights, layer_idx)
        finally:
            steps.close()
        result: X = move(state, self.device)
        return result

    def sweep(self) -> Sweep:
        """One pass as a loop: yields (layer_idx, weights) for every layer, in order.

        What :meth:`run_pass` says of weights holds until the loop advances. Leaving the loop early
        ends the pass. A newer pass on the same thread supersedes it: its next advance raises
        SupersededError.
        """
        return sweep(self.opened(), guarded=False)

    def load_static(self, name: str) -> torch.Tensor:
        """One tensor on the device for good (outside the slots), cast as the layers are.

        The same tensor object each time. Raises CheckpointError, ReadError.
        """
        return self.opened().statics.load(name, self._devices[0])

    def host_tensor(self, name: str) -> torch.Tensor:
        """A host view of one tensor as stored, over the file's own pages: for embedding rows.

        Read-only by contract: a write changes a private copy of the page. It stays valid after
        close; a file that is truncated while it is mapped kills the process that touches it.
        """
        return self.opened().statics.view(name)

    def close(self) -> None:
        """Stop the threads and return all memory and file descriptors. Idempotent, any thread.

        A pass that is under way on another thread raises ClosedError.
        """
        if not hasattr(self, "_parts"):
            return  # construction failed
        parts = self._parts
        if parts is not None:
            parts.pipeline.close()
        self._parts = None
        # Detached last: it holds the pipeline, and until here it is what an exit would call.
        self._close_pipeline.detach()

    def __enter__(self) -> LayerStreamer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.num_layers} layers on {self.device}"
        return f"<LayerStreamer {self.manifest.path} ({state})>"

    def opened(self) -> Parts:
        """The parts, for this library's own tools. Raises ClosedError."""
        parts = self._parts
        if parts is None:
            raise ClosedError("the streamer is closed")
        parts.pipeline.check_process()
        return parts
