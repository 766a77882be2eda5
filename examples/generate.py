"""Generate text with a LLaMA or Qwen2 model whose layers stream through bounded memory.

    python examples/generate.py MODEL --prompt "What is the capital of France?"

MODEL is a GGUF file or a directory with safetensors. Only the generated text goes to stdout;
progress and the closing summary go to stderr. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # torch takes seconds to import: main imports it where Ctrl-C is caught
    import torch

    from llm.config import ModelConfig
    from llm.engine import Engine
    from llm.sampling import Sampler
    from llm.totals import Totals

DTYPES = ("float32", "bfloat16", "float16")
POOLS = ("n_gpu", "n_cpu_pinned", "n_cpu")
MEMORY = ("device_budget", "host_budget", "read_mode")


def main(argv: list[str] | None = None) -> int:
    """Exit code of the program: 0, 2 after an error, 130 after Ctrl-C."""
    try:
        _run_reporting_errors(parse_args(argv))
    except KeyboardInterrupt:
        say("")
        return 130
    except BrokenPipeError:
        # The reader has gone. Python would flush stdout once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, ImportError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


def _run_reporting_errors(args: argparse.Namespace) -> None:
    try:
        import torch
        import transformers  # noqa: F401

        from layer_streamer import StreamerError
    except ImportError as error:
        raise ImportError(f"{error} (pip install 'layer-streamer[examples]')") from error
    try:
        run(args)
    except (StreamerError, torch.OutOfMemoryError) as error:
        raise ValueError(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ValueError for one that makes no sense."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a GGUF file, or a directory with safetensors")
    add("--prompt", required=True, metavar="TEXT", help="what to answer; - reads it from stdin")
    add("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    add("--max-new-tokens", type=_at_least(1), default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    add("--seed", type=int, metavar="S", help="the same seed gives the same text")
    dtype_help = "default: float32 on a CPU, bfloat16 on a GPU (float16 or float32 on an older one)"
    add("--dtype", choices=DTYPES, help=dtype_help)
    add("--device", metavar="D", help="a torch device; default: the GPU if there is one")
    for pool in POOLS:
        flag, place = "--" + pool.replace("_", "-"), pool[2:].replace("_", "-")
        add(flag, type=_at_least(0), metavar="N", help=f"layers held ahead in the {place} pool")
    add("--device-budget", metavar="BYTES", help='memory of the device to use: "6GiB", "auto"')
    add("--host-budget", metavar="BYTES", help="the same of host memory")
    add("--read-mode", metavar="MODE", help="auto (default), buffered, direct or mapped")
    add("--timeline", type=Path, metavar="FILE", help="save the last pass for ui.perfetto.dev")
    return parser.parse_args(argv)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    return number


def run(args: argparse.Namespace) -> None:
    """Read what describes the model, open the streamer, write the text, say what it took."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the model's own files
    from layer_streamer import LayerStreamer, read_manifest
    from llm.engine import Engine
    from llm.metadata import load_config, load_tokenizer, metadata_directory
    from llm.names import weight_names
    from llm.sampling import Sampler
    from llm.threads import leave_a_core

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sampler = Sampler(args.temperature, seed=args.seed)
    device, dtype = choose_device(args.device, args.dtype)
    manifest = read_manifest(args.model)
    directory = metadata_directory(manifest, say)
    config = load_config(directory)
    names = weight_names(manifest, config)
    tokenizer = load_tokenizer(directory)
    ids = encode(tokenizer, read_prompt(args.prompt), raw=args.raw)
    new_tokens = fit(len(ids), args.max_new_tokens, config)
    given = {name: getattr(args, name) for name in (*POOLS, *MEMORY)}
    options = {name: value for name, value in given.items() if value is not None}
    leave_a_core()
    with LayerStreamer.from_checkpoint(
        args.model, device=device, dtype=dtype, tail=[names.head], **options
    ) as streamer:
        room = len(ids) + new_tokens
        engine = Engine(streamer, config, names, max_positions=room, dtype=dtype)
        totals = write_text(engine, tokenizer, ids, max_new_tokens=new_tokens, sampler=sampler)
        if args.timeline is not None and streamer.last_pass is not None:
            streamer.last_pass.save_timeline(args.timeline)
        say("\n" + totals.summary(streamer))


def choose_device(device: str | None, dtype: str | None) -> tuple[str | None, torch.dtype]:
    """Device for the streamer (None: its own choice, which is the CPU here) and dtype."""
    import torch

    if device is None and torch.cuda.is_available():
        device = "cuda"
    try:
        chosen = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device {device}: not a torch device") from error
    if dtype is None:
        dtype = "float32"
        if chosen.type == "cuda" and (chosen.index or 0) < torch.cuda.device_count():
            major, _ = torch.cuda.get_device_capability(chosen)
            dtype = "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"
    return device, getattr(torch, dtype)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for "-", without the newline that ends a line."""
    if prompt != "-":
        return prompt
    return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")


def encode(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    """Token ids of the prompt, in the chat template unless ``raw`` or the model has none."""
    from llm.tokenizer import chat_ids, has_chat_template, raw_ids

    if not raw and not has_chat_template(tokenizer):
        say("the model has no chat template: continuing the prompt as it is")
        raw = True
    ids = raw_ids(tokenizer, text) if raw else chat_ids(tokenizer, text)
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def fit(num_prompt: int, max_new_tokens: int, config: ModelConfig) -> int:
    """New tokens that the context has room for; ValueError if the prompt leaves none."""
    room = config.max_positions - num_prompt
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt} tokens, the model's context is {config.max_positions}"
        )
    if room < max_new_tokens:
        say(f"the context has room for {room} new tokens")
    return min(room, max_new_tokens)


def write_text(
    engine: Engine, tokenizer: Any, ids: list[int], *, max_new_tokens: int, sampler: Sampler
) -> Totals:
    """Generate, each token's text on stdout as soon as it is known."""
    from tqdm import tqdm

    from llm.config import id_set
    from llm.generate import generate
    from llm.tokenizer import StreamingDetokenizer
    from llm.totals import Totals

    totals, text = Totals(prompt_tokens=len(ids)), StreamingDetokenizer(tokenizer, ids)
    stop_ids = engine.config.eos_ids | id_set(tokenizer.eos_token_id)
    layers = engine.config.num_layers
    with tqdm(total=layers, desc="prompt", unit="layer", leave=False, disable=None) as bar:
        tokens = generate(
            engine,
            ids,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampler=sampler,
            on_prompt_layer=lambda _: bar.update(),
        )
        began = time.perf_counter()
        for token in tokens:
            bar.close()
            totals.add_pass(engine.streamer, time.perf_counter() - began)
            write(text.push(token) if token not in stop_ids else "")
            began = time.perf_counter()
    write(text.finish())
    return totals


def write(text: str) -> None:
    """Text to stdout at once, as UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
