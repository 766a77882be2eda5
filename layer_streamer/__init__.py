"""Stream a model's layers from disk through host memory to the GPU while it computes."""

from .errors import (
    CheckpointChangedError,
    CheckpointError,
    ClosedError,
    ConfigError,
    ReadError,
    StreamerError,
    SupersededError,
)
from .formats import read_manifest
from .manifest import LayerSpec, Manifest, TensorSpec
from .stats import PassReport, StepReport
from .streamer import LayerStreamer

__version__ = "0.1.0"

__all__ = [
    "CheckpointChangedError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "LayerSpec",
    "LayerStreamer",
    "Manifest",
    "PassReport",
    "ReadError",
    "StepReport",
    "StreamerError",
    "SupersededError",
    "TensorSpec",
    "read_manifest",
]
