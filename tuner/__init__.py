"""The autotuner: pool, batch and read settings for one machine and one checkpoint.

Lives in the repository's ``tuner/`` and is installed as ``layer_streamer.tuner``.
"""

from .tuner import LayerStreamerTuner

__all__ = ["LayerStreamerTuner"]
