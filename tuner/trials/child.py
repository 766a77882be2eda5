"""The candidate's process. Run by path, so that it finds what its parent finds, the same way.

Arguments: the descriptor of a file with the request, that for results.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Measure, tell, end."""
    descriptor, results = (int(number) for number in sys.argv[1:3])
    request = _read_request(descriptor)
    os.set_inheritable(results, False)
    sys.argv[:] = request["argv"]
    sys.path[:] = request["sys_path"]
    # Only now can the package be found.
    from layer_streamer.tuner.trials.frames import FrameWriter
    from layer_streamer.tuner.trials.measure import run_candidate

    run_candidate(request["spec"], FrameWriter(results, request["nonce"]))


def _read_request(descriptor: int) -> Any:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return json.load(file)


if __name__ == "__main__":
    main()
