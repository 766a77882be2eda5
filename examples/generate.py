"""The command ``layer-streamer generate``, as a script."""

from __future__ import annotations

import sys

from layer_streamer.tools.generate_command import main

if __name__ == "__main__":
    sys.exit(main())
