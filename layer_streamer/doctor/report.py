"""A checkup: all that a user needs to know of a machine and a model, and to paste into a report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..assembly import draw_plan
from ..checkpoint.formats import read_manifest
from ..checkpoint.manifest import Manifest
from ..devices.accelerator import open_devices
from ..devices.device import Device
from ..planning.plan import Plan
from ..planning.settings import Settings
from .devices import DeviceFacts, describe_devices, look_at_devices
from .disk import DiskFacts, describe_disk, look_at_disk
from .facts import Fact, Group, Line, learn, notices, render
from .memory import (
    LockTrial,
    MemoryFacts,
    describe_memory,
    look_at_memory,
    try_page_locking,
)
from .model import ModelFacts, describe_model, look_at_model
from .versions import Versions, describe_versions, look_at_versions

MOST_NOTICES = 4


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be looked at."""

    model: Path | None
    """A checkpoint; None: the machine alone."""
    options: Mapping[str, Any]
    """Options of the streamer that were named."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found."""

    versions: Versions
    devices: DeviceFacts
    memory: MemoryFacts
    page_locking: tuple[LockTrial, ...]
    disk: DiskFacts
    model: Fact[ModelFacts] | None
    """None: no model was named."""
    planned_for: str
    """Why the plan is not for the devices that a streamer would take; empty if it is."""
    notices: tuple[str, ...]
    """What the library warned of meanwhile."""

    @property
    def failed(self) -> bool:
        """True if a model was named and there is no plan of it."""
        return self.model is not None and self.model.value is None


def examine(request: Request) -> Report:
    """Look at everything. Raises nothing but an interrupt; takes a few seconds.

    All memory that is allocated and page-locked for trials is given back.
    """
    with warnings.catch_warnings(), notices() as said:
        warnings.simplefilter("ignore")
        versions, devices, memory = look_at_versions(), look_at_devices(), look_at_memory()
        manifest: Fact[Manifest] = Fact(None, "no model was named")
        if request.model is not None:
            model, pattern = request.model, request.options.get("layer_pattern")
            manifest = learn(lambda: read_manifest(model, pattern))
        disk = look_at_disk(manifest.value)
        opened, planned_for = _open(request, devices)
        file = next(iter(manifest.value.files)) if manifest.value is not None else None
        trials = try_page_locking(opened.value or (), file)
        facts = None
        if request.model is not None:
            facts = _look_at_model(request, manifest, opened, disk.cached.value or 0.0)
    return Report(versions, devices, memory, trials, disk, facts, planned_for, tuple(said))


def screen(report: Report) -> str:
    """The report for people, no wider than a screen; warnings begin with "!"."""
    num_files = report.model.value.num_files if report.model and report.model.value else 0
    groups = [
        describe_versions(report.versions),
        describe_devices(report.devices),
        describe_memory(report.memory, report.page_locking, num_files),
        describe_disk(report.disk),
    ]
    if report.model is not None:
        groups += _model_groups(report, report.model)
    said = [
        Line("", text, "a streamer warns of that, too") for text in report.notices[:MOST_NOTICES]
    ]
    groups.append(Group("notices", tuple(said)))
    count = sum(bool(line.advice) for group in groups for line in group.lines)
    found = f"{count} warning{'s' if count > 1 else ''}, marked with !" if count else "no warnings"
    return f"{render(groups)}\n{found}"


def document(report: Report) -> dict[str, Any]:
    """The report as JSON has it: dicts, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(report), default=str, allow_nan=False))
    return plain


def _open(request: Request, devices: DeviceFacts) -> tuple[Fact[Sequence[Device]], str]:
    """The devices that a streamer would take; the CPU, and why, where a GPU cannot be used.

    None are opened where that would wait without end.
    """
    if devices.system.hangs:
        # To plan, even for the CPU, is to ask for the names of GPUs.
        return Fact(None, devices.system.cards.reason), ""
    named = request.options.get("device")
    opened: Fact[Sequence[Device]] = learn(lambda: open_devices(named))
    if opened.value is None and named is None:
        return learn(lambda: open_devices("cpu")), opened.reason
    return opened, ""


def _look_at_model(
    request: Request, manifest: Fact[Manifest], opened: Fact[Sequence[Device]], cached: float
) -> Fact[ModelFacts]:
    found, devices = manifest.value, opened.value
    if found is None or devices is None:
        return Fact(None, manifest.reason if found is None else opened.reason)

    def look() -> ModelFacts:
        settings = Settings(**request.options)
        plan: Plan = draw_plan(found, devices, settings, {})
        return look_at_model(found, plan, settings, cached)

    return learn(look)


def _model_groups(report: Report, model: Fact[ModelFacts]) -> list[Group]:
    if model.value is None:
        return [Group("model", (Line("no plan", model.reason, _remedy(model.reason)),))]
    first, changes = describe_model(model.value)
    if report.planned_for:
        line = Line("planned for", f"the CPU: {report.planned_for}", "see devices, above")
        first = Group(first.title, (line, *first.lines))
    return [first, changes]


def _remedy(reason: str) -> str:
    """What to do about a model of which no plan can be made."""
    if "layer_pattern" in reason:
        return "name the prefix of a layer's tensors: --layer-pattern 'decoder.block.{i}.'"
    if "budget" in reason or "device" in reason or "n_gpu" in reason:
        return "name other options; the groups above say what is free"
    return "name a safetensors folder or file, or a GGUF file; or fetch it again"
