"""``layer-streamer quantize`` as a script."""

import sys

try:
    from layer_streamer.tools.cli import main
except ImportError as error:
    sys.exit(f"error: {error} (pip install 'layer-streamer[llm]', or pip install -e '.[llm]')")

sys.exit(main(["quantize", *sys.argv[1:]]))
