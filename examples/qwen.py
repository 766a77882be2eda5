"""Qwen2.5-7B-Instruct, 15 GB of weights, in 6 GiB of a GPU's memory."""

from layer_streamer.llm import StreamingEngine

with StreamingEngine("Qwen/Qwen2.5-7B-Instruct", device_budget="6GiB") as engine:
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    for text in engine.generate(question, max_new_tokens=200, stream=True):
        print(text, end="", flush=True)
