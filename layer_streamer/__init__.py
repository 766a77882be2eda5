"""Stream a model's layers from disk through host memory to the GPU while it computes."""

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
    "ReadError",
    "StepReport",
    "StreamerError",
    "SupersededError",
    "TensorSpec",
    "TuneError",
    "read_manifest",
]
