"""CUDA graphs: work that is launched once, captured, and from then on replayed as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache

import torch

logger = logging.getLogger(__name__)


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that is captured: libraries keep memory for each that they see."""
    return torch.cuda.Stream(device)


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture broke off: torch's allocator of host memory may go on asking them."""


class Graphs:
    """Captured work of one device, by a key for what differs between captures.

    The graphs share a pool of memory, so they are not to be replayed at the same time, and what
    they leave there is gone with the next. Everything else that the work uses must stay where it
    is, and is kept by the caller. Thread rules: one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.failed = False
        """True: something could not be captured, and nothing more is to be run here."""

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def run(self, key: Hashable, work: Callable[[], None]) -> bool:
        """Do ``work``, which only launches: by its graph, or for the first time, whereupon it is
        captured. False: it failed, and must be done otherwise.

        It is ordered on the current stream, before and after.
        """
        with torch.cuda.device(self._device):
            graph = self._graphs.get(key)
            if graph is not None:
                graph.replay()
                return True
            done = False
            try:
                self._launch(work)
                done = True
                self._capture(key, work)
            except Exception as error:  # drivers, compilers and allocators fail in their own ways
                self._give_up(error)
            return done

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        with suppress(Exception):  # of a device that is lost
            torch.cuda.synchronize()  # others may be under way
        self._graphs.clear()
        # What broke a capture off is followed by an error of its end.
        cause = error.__context__ or error
        first_line = str(cause).strip().partition("\n")[0]
        logger.warning(
            "decoding goes layer by layer: a CUDA graph could not be captured: %s: %s",
            type(cause).__name__,
            first_line,
        )

    def _launch(self, work: Callable[[], None]) -> None:
        """Once in the usual way: kernels are compiled, and libraries take what they keep."""
        stream, current = capture_stream(self._device), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                work()
        finally:
            current.wait_stream(stream)

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream the current one, but for the outer context.
        with torch.cuda.stream(torch.cuda.current_stream()):
            capture = torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=capture_stream(self._device),
                capture_error_mode="thread_local",  # other threads go on with what they do
            )
            try:
                with capture:
                    work()
            except BaseException:
                self._end_capture(graph)
                raise
        self._graphs[key] = graph

    def _end_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell torch's allocator that a capture is over, which it does not hear of if CUDA broke it
        off: it would put off freeing memory for good."""
        index = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except RuntimeError:
            return  # it has heard
        _abandoned.append(graph)
        torch._C._cuda_releasePool(index, self._pool)
