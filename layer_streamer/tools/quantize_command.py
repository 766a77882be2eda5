"""Quantize a model to 4 or 8 bits, in the format that transformers and vLLM load.

    layer-streamer quantize MODEL OUT --bits 4 --calibrate TEXT

MODEL is a directory with safetensors, a GGUF file, or the name of a Hugging Face repository. OUT
becomes a directory with compressed-tensors weights (pack-quantized, symmetric), config and
tokenizer. A run that was ended goes on when it is started again. The path of OUT is all of stdout;
progress and what quantizing did go to stderr. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import printable
from .command import say
from .engine_options import DTYPES, add_language_model, read_model

if TYPE_CHECKING:
    import torch

    from ..llm.opening import Model
    from ..llm.quantize.errors import Errors
    from ..llm.quantize.job import Job

CALIBRATION_TOKENS = 8192
TEXT_TOKENS = 16384
"""Of --text at most: what they take is kept for all of them at once."""
LEAST_TOKENS = 2
BAR = "{l_bar}{bar}| {elapsed} so far, {remaining} left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_language_model(parser)
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="the directory to make; its parent must be there")
    add("--bits", type=int, choices=(4, 8), required=True)
    group_help = "weights that share a scale; auto (default): the most that divides each width"
    add("--group", choices=("auto", "128", "64", "32"), default="auto", help=group_help)
    add("--calibrate", type=Path, metavar="FILE", help="a text: errors count by what it uses")
    tokens_help = f"of the calibration text at most; default: {CALIBRATION_TOKENS}"
    add("--tokens", type=int, default=CALIBRATION_TOKENS, metavar="N", help=tokens_help)
    add("--text", type=Path, metavar="FILE", help="compare the perplexities of both models on it")
    dtype_help = "of scales and what is not quantized; default: as MODEL if that has 16 bits"
    add("--dtype", choices=DTYPES, help=dtype_help)
    add("--device", metavar="D", help="a torch device; default: the GPU if there is one")


def run(args: argparse.Namespace) -> None:
    """Read what describes the model, quantize it, and say what that did."""
    if args.tokens < LEAST_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: must be at least {LEAST_TOKENS}")
    model = read_model(args)
    from ..llm.memory.placing import choose_device
    from ..llm.quantize.errors import error_table
    from ..llm.quantize.grouping import choose_groups
    from ..llm.quantize.job import Job
    from ..llm.quantize.layers import Recipe
    from ..llm.quantize.scales import Rounding
    from ..llm.threads import leave_a_core

    groups = choose_groups(model.config, None if args.group == "auto" else int(args.group))
    calibration = text = None
    if args.calibrate is not None:
        calibration = read_tokens(model, args.calibrate, args.tokens)
        say(f"{args.calibrate}: {len(calibration):,} tokens to calibrate with")
    if args.text is not None:
        text = read_tokens(model, args.text, TEXT_TOKENS)
    leave_a_core()
    job = Job(
        model=model,
        recipe=Recipe(Rounding(args.bits, choose_dtype(model, args.dtype)), groups),
        out=Path(os.path.realpath(args.out)),
        device=choose_device(args.device),
        calibration=calibration or (),
    )
    say("groups: " + ", ".join(f"{name.partition('.')[2]} {n}" for name, n in groups.items()))
    errors = run_job(job)
    say(error_table(errors, groups))
    tell_of_unseen(model, errors)
    before, after = model.manifest.nbytes, sum(p.stat().st_size for p in job.out.iterdir())
    say(f"{before / 1e9:.3f} GB before, {after / 1e9:.3f} GB after ({after / before:.1%})")
    if text is not None:
        compare(model, job, args.text, text)
    print(printable(str(args.out)), flush=True)


def read_tokens(model: Model, path: Path, most: int) -> list[int]:
    """The first tokens of a text; ValueError if there are too few to say anything."""
    from ..llm.text.tokenizer import raw_ids

    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    ids = raw_ids(model.tokenizer, content)
    if len(ids) < LEAST_TOKENS:
        raise ValueError(f"{path}: {len(ids)} tokens, at least {LEAST_TOKENS} are needed")
    return ids[:most]


def choose_dtype(model: Model, asked: str | None) -> torch.dtype:
    """What was asked for, else float16 for a model in it, else bfloat16."""
    import torch

    if asked is not None:
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    spec = model.manifest.static[model.names.norm]
    return torch.float16 if spec.dtype == torch.float16 else torch.bfloat16


def run_job(job: Job) -> dict[str, Errors]:
    """Quantize with a progress bar; of layers that are done already, it says how many."""
    from ..llm.quantize.job import quantize
    from ..llm.quantize.shards import check_room
    from ..machine.atomic import naming
    from ..progress import ProgressBar

    partial = job.out.with_name(job.out.name + ".partial")
    there = sum(p.stat().st_size for p in partial.iterdir()) if partial.is_dir() else 0
    check_room(job.out, job.nbytes() - there)
    layers = [job.layer_weights(layer_idx) for layer_idx in range(job.model.config.num_layers)]
    with ProgressBar(total=sum(layers), leave=False, disable=None, bar_format=BAR) as bar:

        def start(missing: Collection[int]) -> None:
            if len(missing) < len(layers):
                say(f"going on: {len(layers) - len(missing)} of {len(layers)} layers are done")
            bar.reset(total=sum(layers[layer_idx] for layer_idx in missing))

        try:
            with naming(partial):
                return quantize(job, bar.update, start)
        except KeyboardInterrupt:
            bar.close()
            if partial.is_dir():
                say(f"{partial} is kept: the same command goes on with it")
            raise


def tell_of_unseen(model: Model, errors: Mapping[str, Errors]) -> None:
    """How many experts the calibration text says nothing of, if there are any."""
    from ..llm.models.modules import EXPERTS, MATRICES

    experts, found = model.config.experts, errors.get(f"{EXPERTS}{MATRICES[0]}")
    if experts is not None and found is not None and found.unseen:
        say(
            f"{found.unseen:,} of {experts.total:,} experts were chosen by no token of the "
            "calibration text: all weights of a row count alike in them"
        )


def compare(model: Model, job: Job, path: Path, ids: list[int]) -> None:
    """The perplexities of both models on a text."""
    from ..llm.opening import Model
    from ..llm.quantize.perplexity import perplexity
    from ..llm.quantize.texts import WINDOW
    from ..progress import ProgressBar

    with ProgressBar(
        total=2 * model.config.num_layers, leave=False, disable=None, bar_format=BAR
    ) as bar:
        before = perplexity(model, ids, job.device, lambda _: bar.update())
        after = perplexity(Model.read(job.out, say), ids, job.device, lambda _: bar.update())
    say(
        f"{path}: perplexity {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%}) on "
        f"{len(ids):,} tokens in windows of {min(WINDOW, model.config.max_positions)}"
    )
