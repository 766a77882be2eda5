"""Stream a model's layers from disk through host memory to the GPU while it computes."""

from .budget import format_bytes, parse_bytes
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
from .formats import read_manifest
from .manifest import LayerSpec, Manifest, TensorSpec
from .plan import Plan
from .preview import plan_checkpoint
from .stats import PassReport, StepReport
from .streamer import LayerStreamer
from .tuner import LayerStreamerTuner

__version__ = "0.1.0"

__all__ = [
    "CheckpointChangedError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "LayerSpec",
    "LayerStreamer",
    "LayerStreamerTuner",
    "Manifest",
    "PassReport",
    "Plan",
    "ReadError",
    "StepReport",
    "StreamerError",
    "SupersededError",
    "TensorSpec",
    "TuneError",
    "format_bytes",
    "parse_bytes",
    "plan_checkpoint",
    "read_manifest",
]
