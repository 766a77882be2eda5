"""``examples/ray_batch.py`` on a cluster of its own, where one actor, in the midst of its second
batch, says which process it is, and waits to be killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from examples import ray_batch
from layer_streamer.llm import ray_data

PLACE = "MORTAL_ROWS"
"""Of the environment: a folder with a pipe ``said``, which a test reads."""


class MortalLines(ray_data.AnswerLines):
    calls = 0

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        self.calls += 1
        if self.calls == 2:
            place = Path(os.environ[PLACE])
            try:
                (place / "taken").touch(exist_ok=False)
            except FileExistsError:  # by the other actor, or by this one's last life
                return super().__call__(batch)
            super().__call__({name: column[:5] for name, column in batch.items()})
            (place / "said").write_text(f"{os.getpid()}\n")
            signal.pause()
        return super().__call__(batch)


def run() -> None:
    """The script, with the arguments of this process."""
    ray_data.AnswerLines = MortalLines  # type: ignore[misc]
    ray.init(
        address="local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False,
        logging_level="WARNING",
    )  # fmt: skip
    try:
        code = ray_batch.main(sys.argv[1:])
    finally:
        ray.shutdown()
    sys.exit(code)
