"""A process that runs trials one after the other and says on stdout how they go."""

from __future__ import annotations

import sys
from pathlib import Path

import tuner_setups
from tuner_support import try_setup


def main() -> None:
    setup_fn = getattr(tuner_setups, sys.argv[2])
    while True:
        try_setup(
            Path(sys.argv[1]), setup_fn, on_event=lambda stage, seconds: print(stage, flush=True)
        )


if __name__ == "__main__":
    main()
