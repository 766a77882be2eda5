"""What a trial's child does: open the streamer, call setup_fn, measure run()."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch

from ...devices.accelerator import open_devices
from ...errors import ConfigError
from ...measuring.bench import discard_prefetched, settle
from ...measuring.footprint import device_peak
from ...measuring.rawspeed import Load, synchronize
from ...measuring.threads import leave_a_core
from ...streamer import LayerStreamer
from .course import Timed
from .failures import describe
from .frames import CANNOT_TELL, DescriptorLostError, FrameWriter
from .model_args import decode_model
from .pagecache import PageCache
from .progress import telling_of_progress
from .record import FunctionName, TrialSpec
from .setup_fn import load_function

MEMORY_STEP = 16 << 20
"""Bytes of device memory by which what is free must rise to count as rising."""
MEMORY_LOOK_SECONDS = 0.05
MEMORY_WAIT_SECONDS = 5.0


def main(request: Mapping[str, Any]) -> None:
    """Run the trial that is asked for (by a TrialSpec as JSON) and end this process."""
    os.set_inheritable(request["results"], False)
    results = FrameWriter(request["results"], request["nonce"])
    trial = Trial(_decode(request["spec"]), results)
    try:
        try:
            with leave_a_core():
                results.send({"result": trial.measure()})
        except BaseException as error:  # a lost descriptor is lost to the next word, too
            ending, detail = describe(error, trial.stage, __file__)
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            results.send({"failed": ending, "detail": detail})
    except DescriptorLostError:
        os._exit(CANNOT_TELL)
    os._exit(0)


class Trial:
    """One trial, stage by stage. Thread rules: one thread."""

    def __init__(self, spec: TrialSpec, results: FrameWriter) -> None:
        self._spec = spec
        self._results = results
        self._notes: list[str] = []
        self.stage = "start"

    def measure(self) -> dict[str, Any]:
        """The whole trial; its result."""
        streamer, run = self._open()
        cache, cold = PageCache(streamer.manifest.files), self._spec.cache == "cold"
        for number in range(1, self._spec.n_runs + 1):
            if number > 1 and self._spec.sleep_seconds:
                self._begin("sleep")
                time.sleep(self._spec.sleep_seconds)
            if not cold:
                self._begin("cache")
                with telling_of_progress(self._alive):
                    self._note(cache.fill())
            if number == 1:
                self._timed(streamer, run, "run 1", "warm-up")
                continue
            if cold:
                self._begin("cache")
                # Prefetch reads on by itself, and would bring back what is dropped.
                settle(streamer)
                self._note(cache.drop())
            else:
                self._timed(streamer, run, f"before run {number}", "untimed")
            self._timed(streamer, run, f"run {number}", "measured")
        return self._result(streamer)

    def _open(self) -> tuple[LayerStreamer, Callable[[], object]]:
        """A streamer, and what setup_fn returns for it; or an engine's streamer and its work."""
        spec = self._spec
        arguments = {**decode_model(spec.model), **spec.settings}
        self._begin("import")
        make: Callable[..., Any]
        if spec.engine is not None:
            make, setup = import_module(spec.engine).open_workload, None
            arguments["alive"] = self._alive
            if spec.setup_fn is not None:
                arguments["setup_fn"] = load_function(spec.setup_fn)
        else:
            make = LayerStreamer.from_checkpoint if "path" in arguments else LayerStreamer
            setup = load_function(spec.setup_fn) if spec.setup_fn else synthetic_setup(spec.tokens)
            arguments["track_progress"] = False
        if spec.on_copy is not None:
            arguments["on_copy"] = load_function(spec.on_copy)
        self._begin("device")
        await_device_memory(arguments.get("device"))
        self._begin("open")
        with telling_of_progress(self._alive):
            opened: Any = make(**arguments)
        if setup is None:
            return opened.streamer, opened.run
        self._begin("setup")
        run = setup(opened)
        if not callable(run):
            raise ConfigError(f"setup_fn returned {run!r}: must be a function run()")
        return opened, run

    def _timed(
        self, streamer: LayerStreamer, run: Callable[[], object], stage: str, kind: Timed
    ) -> None:
        """One run, from when the devices' work before it is done until its own is."""
        devices = streamer.devices
        for device in devices:
            synchronize(device)
        self._begin(stage, kind)
        if kind == "measured" and self._spec.cache == "cold":
            discard_prefetched(streamer)  # prefetch starts over together with the clock
        begin = time.perf_counter()
        found = run()
        for device in devices:
            synchronize(device)
        seconds = time.perf_counter() - begin
        parts = found if self._spec.engine else {}
        peak = device_peak(devices)
        self._results.send({"seconds": seconds, "device_peak": peak, "parts": parts})

    def _result(self, streamer: LayerStreamer) -> dict[str, Any]:
        report = streamer.last_pass
        steps = report.steps if report is not None else {}
        return {
            "step_bytes": {name: step.bytes for name, step in steps.items()},
            "stalled_seconds": {name: step.stalled_seconds for name, step in steps.items()},
            "pass_seconds": report.seconds if report is not None else 0.0,
            "detail": "; ".join(self._notes),
        }

    def _begin(self, stage: str, kind: Timed = "") -> None:
        self.stage = stage
        self._results.send({"stage": stage, "timed": kind})

    def _alive(self) -> None:
        """Something goes on in a stage that may take long."""
        self._results.send({"alive": True})

    def _note(self, note: str) -> None:
        if note and note not in self._notes:
            self._notes.append(note)


def synthetic_setup(tokens: int) -> Callable[[LayerStreamer], Callable[[], object]]:
    """A setup_fn whose run() is one pass: each matrix times ``tokens`` vectors, as bench does."""

    def setup(streamer: LayerStreamer) -> Callable[[], object]:
        x = torch.zeros(1, dtype=torch.float32, device=streamer.device)
        return partial(streamer.run_pass, x, Load(tokens))

    return setup


def await_device_memory(names: Any) -> None:
    """Wait while the free memory of a device rises: the last trial's may still be coming back.

    A driver gives a process's memory back before the process can be reaped, as a rule, and the
    next one takes seconds to come here; this is for the exceptions.
    """
    devices = [device for device in open_devices(names) if not device.unified]
    deadline = time.monotonic() + MEMORY_WAIT_SECONDS
    free = [device.free_bytes() for device in devices]
    rising = bool(devices)
    while rising and time.monotonic() < deadline:
        time.sleep(MEMORY_LOOK_SECONDS)
        now = [device.free_bytes() for device in devices]
        rising = any(after > before + MEMORY_STEP for before, after in zip(free, now, strict=True))
        free = now


def _decode(spec: Mapping[str, Any]) -> TrialSpec:
    names = {
        option: None if spec[option] is None else FunctionName(**spec[option])
        for option in ("setup_fn", "on_copy")
    }
    return TrialSpec(**{**spec, **names})
