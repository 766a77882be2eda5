"""llama.cpp, which computes on the processor what the device has no room for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any
from urllib.request import Request, urlopen

from .memory import DeviceWatch
from .session import Asked, SkipError

FIRST_GUESS = 1 << 30
"""Of a limit: what llama.cpp takes beside the layers, before that was measured."""
TRIES = 5
NO_PROMPT, NO_TOKENS = ("-p", "0"), ("-n", "0")


def file_of(asked: Asked) -> Path:
    """SkipError without a GGUF file."""
    if asked.gguf is None:
        raise SkipError("needs a GGUF file of the same weights (--gguf)")
    return asked.gguf


class Bench:
    """llama-bench, with so many layers on the device."""

    def __init__(self, asked: Asked) -> None:
        found = asked.llama_bench or shutil.which("llama-bench")
        if found is None:
            raise SkipError("no llama-bench on PATH (or --llama-bench FILE)")
        self._asked, self.layers = asked, 0
        self._command = [found, "-m", str(file_of(asked)), "-o", "json"]
        self._command += ["-t", str(asked.threads)]
        self.peak: int | None = None
        self.build: Any = None

    def run(self, *options: str, repeats: int) -> dict[str, Any]:
        """One test: its document."""
        command = [*self._command, "-ngl", str(self.layers), "-r", str(repeats), *options]
        with DeviceWatch() as watch:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if watch.nbytes is not None:
            self.peak = max(self.peak or 0, watch.nbytes)
        if done.returncode != 0:
            *_, last = done.stderr.strip().splitlines() or ["it says nothing"]
            raise RuntimeError(f"llama-bench: {last}")
        (found,) = json.loads(done.stdout)
        self.build = f"{found['build_commit']} ({found['build_number']})"
        return dict(found)

    def fill(self, layer_nbytes: list[int]) -> None:
        """As many layers as the limit has room for, found by trying: what the driver counts."""
        asked = self._asked
        if not asked.cuda:
            return
        most = len(layer_nbytes) + 1  # and the head
        if asked.gpu_layers is not None or asked.device_nbytes is None:
            self.layers = most if asked.gpu_layers is None else asked.gpu_layers
            return
        each = max(layer_nbytes)
        self.layers = min(max((asked.device_nbytes - FIRST_GUESS) // each, 0), most)
        fitting, too_many = 0, most + 1
        for _ in range(TRIES):
            self.peak = None
            self.run("-p", str(asked.prompt), *NO_TOKENS, repeats=1)
            assert self.peak is not None
            room = asked.device_nbytes - self.peak
            if room >= 0:
                fitting = max(fitting, self.layers)
            else:
                too_many = min(too_many, self.layers)
            wanted = min(max(self.layers + room // each, fitting), too_many - 1)
            if wanted == self.layers:
                break
            self.layers = wanted
        self.layers, self.peak = min(self.layers, max(fitting, 0)), None


def llama_bench(asked: Asked) -> dict[str, Any]:
    """Its own bench program: a prompt, then tokens behind one."""
    bench = Bench(asked)
    bench.fill(layer_sizes(file_of(asked)))
    prompt = bench.run("-p", str(asked.prompt), *NO_TOKENS, repeats=asked.turns)
    behind = ("-d", str(asked.prompt))
    tokens = bench.run(*NO_PROMPT, "-n", str(asked.tokens), *behind, repeats=asked.turns)
    return {
        "version": bench.build,
        "gpu_layers": bench.layers,
        "first_token": median(prompt["samples_ns"]) / 1e9,
        "seconds_per_pass": median(tokens["samples_ns"]) / 1e9 / asked.tokens,
        "tokens_per_second": fmean(tokens["samples_ts"]),
        "prompt_ns": prompt["samples_ns"],
        "tokens_ns": tokens["samples_ns"],
    }


def layer_sizes(path: Path) -> list[int]:
    """Bytes of each layer."""
    import gguf

    sizes: dict[int, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if found := re.match(r"blk\.(\d+)\.", tensor.name):
            number = int(found[1])
            sizes[number] = sizes.get(number, 0) + int(tensor.n_bytes)
    return [sizes[number] for number in sorted(sizes)]


def xllamacpp(asked: Asked) -> dict[str, Any]:
    """llama.cpp's server out of the xllamacpp wheel, on the processor alone."""
    import xllamacpp as package

    if asked.cuda:
        raise SkipError("its wheel computes on a processor")
    begin = time.perf_counter()
    given = package.CommonParams()
    given.model.path, given.port = str(file_of(asked)), 0
    given.n_ctx, given.n_parallel, given.n_gpu_layers = asked.prompt + asked.tokens + 16, 1, 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = asked.threads
    given.warmup, given.verbosity, given.cache_prompt = False, -1, False
    server = package.Server(given)
    opened = time.perf_counter() - begin
    turns = []
    for turn in range(asked.turns):
        body = {
            "prompt": asked.prompt_ids(turn),
            "n_predict": asked.tokens + 1,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        data = json.dumps(body).encode()
        ask = Request(f"{server.listening_address}/completion", data)
        with urlopen(ask, timeout=asked.seconds + 600) as reply:
            found = json.loads(reply.read())
        turns.append({"timings": found["timings"], "ids": found.get("tokens")})
    each = turns[-1]["timings"]["predicted_per_token_ms"] / 1e3
    return {
        "open_seconds": opened,
        "first_token": turns[-1]["timings"]["prompt_ms"] / 1e3,
        "seconds_per_pass": each,
        "tokens_per_second": 1 / each,
        "turns": turns,
    }
