"""Qwen2.5-7B-Instruct, 15 GB of weights, in 6 GiB of a GPU's memory."""

import argparse
import sys
from importlib.util import find_spec

argparse.ArgumentParser(description=__doc__).parse_args()  # --help, before anything is downloaded
if find_spec("layer_streamer") is None:
    sys.exit("error: layer_streamer is not installed (pip install 'layer-streamer[llm]')")

from layer_streamer.llm import StreamingEngine

with StreamingEngine("Qwen/Qwen2.5-7B-Instruct", device_budget="6GiB") as engine:
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    for text in engine.generate(question, max_new_tokens=200, stream=True):
        print(text, end="", flush=True)
