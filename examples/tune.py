"""The command ``layer-streamer tune``, as a script."""

from __future__ import annotations

import sys

from layer_streamer.tools.tune_command import main

if __name__ == "__main__":
    sys.exit(main())
