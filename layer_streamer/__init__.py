"""Stream a model's layers from disk through host memory to the GPU while it computes.

Public names are imported when they are first asked for, so that a command that only says what it
can do, or what is wrong, need not wait for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if os.name != "posix":
    raise ImportError("layer-streamer runs on Linux, on macOS, and on Windows in WSL2 only")

if TYPE_CHECKING:
    from .checkpoint.formats import read_manifest
    from .checkpoint.json_file import read_json
    from .checkpoint.manifest import LayerSpec, Manifest, TensorSpec
    from .devices.pieces import copy_pieces
    from .errors import (
        CheckpointChangedError,
        CheckpointError,
        ClosedError,
        ConfigError,
        ReadError,
        StreamerError,
        SupersededError,
        TuneError,
    )
    from .experts.trace import ExpertPass, TraceHeader
    from .experts.trace_writer import TraceWriter
    from .machine.cache import cache_path
    from .machine.limits import ProductRate
    from .measuring.products import product_rates
    from .modules.handle import ModulePlan, ModuleStreamer
    from .modules.pipelines.handle import PipelinePlan, PipelineStreamer
    from .modules.stream import stream
    from .passes.expert_report import ExpertReport
    from .planning.budget import format_bytes, parse_bytes
    from .planning.plan import Plan
    from .preview import plan_checkpoint
    from .streamer import LayerStreamer
    from .transport.stats import PassReport, StepReport
    from .tuner import LayerStreamerTuner

__version__ = "0.1.0"

__all__ = [
    "CheckpointChangedError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "ExpertPass",
    "ExpertReport",
    "LayerSpec",
    "LayerStreamer",
    "LayerStreamerTuner",
    "Manifest",
    "ModulePlan",
    "ModuleStreamer",
    "PassReport",
    "PipelinePlan",
    "PipelineStreamer",
    "Plan",
    "ProductRate",
    "ReadError",
    "StepReport",
    "StreamerError",
    "SupersededError",
    "TensorSpec",
    "TraceHeader",
    "TraceWriter",
    "TuneError",
    "cache_path",
    "copy_pieces",
    "format_bytes",
    "parse_bytes",
    "plan_checkpoint",
    "product_rates",
    "read_json",
    "read_manifest",
    "stream",
]

_PLACES = {
    "read_manifest": "checkpoint.formats",
    "read_json": "checkpoint.json_file",
    **dict.fromkeys(("LayerSpec", "Manifest", "TensorSpec"), "checkpoint.manifest"),
    **dict.fromkeys(("format_bytes", "parse_bytes"), "planning.budget"),
    "Plan": "planning.plan",
    "copy_pieces": "devices.pieces",
    "cache_path": "machine.cache",
    "ProductRate": "machine.limits",
    "product_rates": "measuring.products",
    "plan_checkpoint": "preview",
    "LayerStreamer": "streamer",
    "ExpertReport": "passes.expert_report",
    **dict.fromkeys(("ExpertPass", "TraceHeader"), "experts.trace"),
    "TraceWriter": "experts.trace_writer",
    **dict.fromkeys(("ModulePlan", "ModuleStreamer"), "modules.handle"),
    **dict.fromkeys(("PipelinePlan", "PipelineStreamer"), "modules.pipelines.handle"),
    "stream": "modules.stream",
    **dict.fromkeys(("PassReport", "StepReport"), "transport.stats"),
    "LayerStreamerTuner": "tuner",
}
"""Where public names are; those that are not here are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
