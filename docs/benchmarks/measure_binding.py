"""Measure what a streamed block costs the processor beyond a pass of the streamer.

    python docs/benchmarks/measure_binding.py [--turns N]

A Qwen2 of 28 tiny blocks of 12 tensors on a CPU, streamed, beside the same model with its own
weights whose blocks each take a step of a sweep before they run, and no more; in turn. All layers
are resident, so that no other thread is at work, and handed out all the same. Processor time of the
calling thread, the least of each. Needs transformers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import layer_streamer as ls

BLOCKS = 28
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "num_hidden_layers": BLOCKS,
}


def step(steps: list[Iterator[Any]], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's forward, after the next step of the sweep."""
    next(steps[0])
    return forward(*args, **kwargs)


def main() -> int:
    """Measure, and print microseconds a block."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=100, metavar="N")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    ids = torch.ones(1, 1, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).eval()
        plain.save_pretrained(folder)
        streamed: Any = ls.stream(folder, device="cpu", device_budget="1GiB")
        bare = ls.LayerStreamer.from_checkpoint(folder, device="cpu", device_budget="1GiB")
        steps: list[Iterator[Any]] = []
        for block in plain.model.layers:
            block.forward = partial(step, steps, block.forward)

        def run_beside_a_sweep() -> None:
            steps[:] = [bare.sweep()]
            plain(ids, use_cache=False)
            next(steps.pop(), None)

        runs = {
            "streamed": lambda: streamed(ids, use_cache=False),
            "beside a sweep": run_beside_a_sweep,
        }
        least = dict.fromkeys(runs, float("inf"))
        for _ in range(turns):
            for name, run in runs.items():
                begin = time.thread_time()
                run()
                least[name] = min(least[name], time.thread_time() - begin)
        streamed.layer_streamer.close()
        bare.close()
    beyond = least["streamed"] - least["beside a sweep"]
    print(", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in least.items()))
    print(f"{beyond / BLOCKS * 1e6:.1f} us a block beyond the sweep")
    return 0


if __name__ == "__main__":
    sys.exit(main())
