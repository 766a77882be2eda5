"""``layer-streamer finetune`` as a script."""

import sys

try:
    from layer_streamer.tools.cli import main
except ImportError as error:
    message = f"error: {error} (pip install 'layer-streamer[finetune]', or -e '.[finetune]')"
    sys.exit(message)

sys.exit(main(["finetune", *sys.argv[1:]]))
