"""LayerStreamer: opens a checkpoint, runs passes over its layers, closes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from .accelerator import open_device
from .caller import Caller
from .config import OnCopy, PassConfig, PoolConfig
from .errors import ClosedError, SupersededError
from .files import OpenFiles
from .formats import read_manifest
from .layout import plan_steps
from .manifest import Manifest, manifest_from_tensor_info
from .memory import MemoryUse
from .pipeline import Pipeline
from .pool import Weights
from .progress import ProgressBar
from .statics import Statics
from .stats import PassReport
from .tree import move
from .turn import Pass, Turns

X = TypeVar("X")
Sweep: TypeAlias = Generator[tuple[int, Weights], None, None]
LayerFn = Callable[[Any, Weights, int], Any]
"""``layer_fn(x, weights, layer_idx) -> x``."""


class _Parts(NamedTuple):
    """What an open streamer is made of; dropped as one when it is closed."""

    pipeline: Pipeline
    caller: Caller
    statics: Statics


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
        n_gpu: int = 2,
        n_cpu_pinned: int | None = 4,
        n_cpu: int | None = None,
        batch_gpu: int | None = None,
        batch_cpu_pinned: int | None = None,
        batch_cpu: int | None = None,
        track_progress: bool = True,
        *,
        device: str | torch.device | None = None,
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
        config = PoolConfig(
            n_gpu=n_gpu, n_cpu_pinned=n_cpu_pinned, n_cpu=n_cpu, batch_gpu=batch_gpu,
            batch_cpu_pinned=batch_cpu_pinned, batch_cpu=batch_cpu, read_threads=read_threads,
            read_chunk=read_chunk,
        )  # fmt: skip
        self._open(manifest, config, PassConfig(device, None, tail, on_copy, track_progress))

    @classmethod
    def from_checkpoint(  # noqa: PLR0913 - every option by name
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        n_gpu: int = 2,
        n_cpu_pinned: int | None = 4,
        n_cpu: int | None = None,
        batch_gpu: int | None = None,
        batch_cpu_pinned: int | None = None,
        batch_cpu: int | None = None,
        read_threads: int | None = None,
        read_chunk: int | None = None,
        tail: Sequence[str] = (),
        on_copy: OnCopy | None = None,
        layer_pattern: str | None = None,
        track_progress: bool = False,
    ) -> LayerStreamer:
        """Open a safetensors directory or file, or a GGUF file; its layers are found by name.

        * ``device``: a torch device; None takes the GPU if there is one, else the CPU.
        * ``dtype``: cast F32, F16 and BF16 tensors to it on the device; None leaves them as stored.
        * ``n_gpu``, ``n_cpu_pinned``, ``n_cpu``: layers that the device, pinned and pageable pools
          hold ahead, beside the one in use. None or 0 leaves a host pool out.
        * ``batch_gpu``, ``batch_cpu_pinned``, ``batch_cpu``: layers handed on at a time; None: 1.
        * ``read_threads`` (None: 8), ``read_chunk`` (None: 8 MiB): reader threads, bytes a read.
        * ``tail``: names of tensors to stream after the last layer, split by rows.
        * ``on_copy(layer_idx, stream)``: called on the copier's thread after a layer's copies are
          enqueued on ``stream`` (on the CPU: a stand-in without work), before they count as ready.
        * ``layer_pattern``: prefix of a layer's tensors with ``{i}`` for the index.
        * ``track_progress``: a progress bar over the layers, on stderr.

        Raises CheckpointError for the checkpoint, ConfigError for the options.
        """
        config = PoolConfig(
            n_gpu=n_gpu, n_cpu_pinned=n_cpu_pinned, n_cpu=n_cpu, batch_gpu=batch_gpu,
            batch_cpu_pinned=batch_cpu_pinned, batch_cpu=batch_cpu, read_threads=read_threads,
            read_chunk=read_chunk,
        )  # fmt: skip
        options = PassConfig(device, dtype, tail, on_copy, track_progress)
        self = cls.__new__(cls)
        self._open(read_manifest(path, layer_pattern), config, options)
        return self

    def _open(self, manifest: Manifest, config: PoolConfig, options: PassConfig) -> None:
        steps = plan_steps(manifest, options.tail)
        self.manifest = manifest
        self._device = open_device(options.device)
        self._track_progress = options.track_progress
        self._num_steps = len(steps)
        self._turns = Turns()
        files = OpenFiles(manifest.files)
        pipeline = Pipeline(
            steps, files, self._device, config, dtype=options.dtype, on_copy=options.on_copy
        )
        self._parts: _Parts | None = _Parts(
            pipeline, Caller(pipeline), Statics(manifest, files, options.dtype)
        )
        self._close_pipeline = weakref.finalize(self, pipeline.close)
        pipeline.start()

    @property
    def device(self) -> torch.device:
        """Where layers are handed out."""
        return self._device.torch_device

    @property
    def num_layers(self) -> int:
        """Layers of the checkpoint; tail steps are numbered from here on."""
        return self.manifest.num_layers

    @property
    def num_steps(self) -> int:
        """Hand-outs of a pass: layers and tail steps."""
        return self._num_steps

    @property
    def memory(self) -> MemoryUse:
        """Bytes that the slots take on the host and on the device; it never grows."""
        return self._opened().pipeline.memory

    @property
    def closed(self) -> bool:
        return self._parts is None

    @property
    def last_pass(self) -> PassReport | None:
        """Where the time of the last finished pass went; None before the first.

        Waits until the device has done that pass: the only wait that measuring costs.
        """
        return self._opened().caller.report()

    def run_pass(self, x: X, layer_fn: LayerFn) -> X:
        """One pass: ``x = layer_fn(x, weights, layer_idx)`` for every layer, in order.

        Tensors in ``x`` (also in nested tuples, lists and dicts) are moved to the layer's device.
        ``weights`` maps each tensor's name without the layer's prefix to a tensor of the
        manifest's shape and dtype; they are views of a slot and gone when ``layer_fn`` has
        returned, by when all work that reads them must be ordered before the current stream.

        Raises what ``layer_fn`` raises, or the error of the layer that could not be streamed.
        """
        guard = self._device.guard()
        sweep = self._sweep(guard)
        state: Any = x
        try:
            for layer_idx, weights in sweep:
                state = layer_fn(move(state, self.device), weights, layer_idx)
        finally:
            sweep.close()
        result: X = move(state, self.device)
        return result

    def sweep(self) -> Iterator[tuple[int, Weights]]:
        """One pass as a loop: yields (layer_idx, weights) for every layer, in order.

        What :meth:`run_pass` says of weights holds until the loop advances. Leaving the loop early
        ends the pass. A newer pass on the same thread supersedes it: its next advance raises
        SupersededError.
        """
        return self._sweep(nullcontext())

    def load_static(self, name: str) -> torch.Tensor:
        """One tensor on the device for good (outside the slots), cast as the layers are.

        The same tensor object each time. Raises CheckpointError, ReadError.
        """
        return self._opened().statics.load(name, self._device)

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
        if not hasattr(self, "_close_pipeline"):
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

    def _sweep(self, guard: AbstractContextManager[object]) -> Sweep:
        caller, current = self._opened().caller, Pass()
        bar, unfinished = None, False
        try:
            with guard:
                self._turns.claim(current)
                caller.begin()
                unfinished = True
                if self._track_progress:
                    bar = ProgressBar(total=self._num_steps, unit="layer", leave=False)
                for _ in range(self._num_steps):
                    yield caller.take()
                    if not self._turns.has(current):
                        raise SupersededError("this sweep was overtaken by a newer pass")
                    caller.give_back()
                    if bar is not None:
                        bar.update()
                caller.finish()
                unfinished = False
        finally:
            if unfinished:
                self._end(current, caller)
            current.over = True
            if bar is not None:
                bar.close()

    def _end(self, current: Pass, caller: Caller) -> None:
        """An unfinished pass is over: start prefetching again, if it is still its turn.

        A sweep that is finalized on another thread leaves that to the next pass, which finds out.
        """
        mine = current.thread is threading.current_thread()
        if mine and self._parts is not None and self._turns.has(current):
            caller.abort()

    def _opened(self) -> _Parts:
        parts = self._parts
        if parts is None:
            raise ClosedError("the streamer is closed")
        parts.pipeline.check_process()
        return parts
