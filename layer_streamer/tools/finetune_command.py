"""Fine-tune a model that does not fit: an adapter (LoRA), trained over weights that stream.

    layer-streamer finetune MODEL DATA.jsonl OUT --device-budget 6GiB

MODEL is a directory of transformers' with safetensors, or the name of a Hugging Face repository.
Each line of DATA is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. OUT
becomes an adapter that peft loads, and generate --adapter OUT. A run that was ended goes on when it
is started again. The path of OUT is all of stdout; progress and the closing summary go to stderr.
Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StreamerError, printable
from .command import add_streamer_options, at_least, say, streamer_options
from .engine_options import DTYPES, stay_offline

if TYPE_CHECKING:
    from ..llm.finetuning.samples import Sample, Samples
    from ..llm.finetuning.settings import Settings
    from ..llm.finetuning.unfinished import Unfinished
    from ..llm.finetuning.watching import Watch

NEEDED = ("transformers", "tokenizers", "jinja2", "peft", "accelerate")
NOISY = "(transformers|peft|accelerate)([.]|$)"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {elapsed} so far, {remaining} left{postfix}"
OF_BASES = ("device_budget", "reserve_bytes", "host_budget", "n_gpu", "n_cpu_pinned", "n_cpu",
            "read_mode", "read_threads")  # fmt: skip
"""Options of a streamer that a model in training has a use for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    model_help = "a directory with safetensors, or a repository on the Hugging Face hub"
    add("model", metavar="MODEL", help=model_help)
    add("data", metavar="DATA", type=Path, help="JSON lines to learn from")
    add("out", metavar="OUT", type=Path, help="the adapter to make; its parent must be there")
    held = parser.add_argument_group("what is held out").add_mutually_exclusive_group()
    held.add_argument("--eval", type=Path, metavar="FILE", help="rows that are not learned")
    held.add_argument("--hold-out", type=float, metavar="P", help="this share of DATA, as 0.1")
    _add_adapter(parser)
    _add_course(parser)
    group = parser.add_argument_group("the model")
    group.add_argument("--device", metavar="D", help="cuda or cpu; default: the GPU if there is")
    dtype_help = "of what computes; default: the model's own, on a CPU float32"
    group.add_argument("--dtype", choices=DTYPES, help=dtype_help)
    group.add_argument("--plan", action="store_true", help="say first where everything will be")
    add_streamer_options(parser, OF_BASES)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the adapter").add_argument
    add("--rank", type=int, default=16, metavar="R", help="default: 16")
    add("--alpha", type=float, metavar="A", help="its products count A / R times; default: 2 R")
    add("--dropout", type=float, default=0.0, metavar="P", help="default: 0")
    targets_help = "such as q_proj,v_proj; default: all linear ones of the blocks, none of experts"
    add("--target-modules", metavar="NAMES", help=targets_help)


def _add_course(parser: argparse.ArgumentParser) -> None:
    add, one = parser.add_argument_group("the course").add_argument, at_least(1)
    add("--epochs", type=float, default=3.0, metavar="N", help="over all rows; default: 3")
    add("--steps", type=one, metavar="N", help="in place of epochs")
    add("--learning-rate", type=float, default=2e-4, metavar="L", help="default: 2e-4, falling")
    length_help = "tokens of a row, of which the rest is cut off; default: 2048, or the context"
    add("--length", type=at_least(2), metavar="N", help=length_help)
    batch_help = "rows a pass over the weights; more are faster and take memory; default: 1"
    add("--batch", type=one, default=1, metavar="N", help=batch_help)
    add("--accumulation", type=one, default=8, metavar="N", help="passes a step; default: 8")
    add("--eval-steps", type=one, metavar="N", help="between looks; default: one an epoch")
    save_help = "between checkpoints, which a run that was ended goes on from; default: 50"
    add("--save-steps", type=one, default=50, metavar="N", help=save_help)
    add("--seed", type=int, default=0, metavar="S", help="of adapters and of the rows' order")
    add("--restart", action="store_true", help="begin anew where a run that was ended has come to")


def run(args: argparse.Namespace) -> None:
    """Read the rows, open the model, train, and say what that did."""
    require_trainer()
    from ..llm.finetuning.room import step_nbytes
    from ..llm.finetuning.settings import DEFAULT_LENGTH, Settings
    from ..llm.finetuning.unfinished import Unfinished, digest

    settings = Settings(
        targets=tuple(n for n in (args.target_modules or "").split(",") if n),
        **{n: getattr(args, n) for n in Settings.__slots__ if n != "targets"},
    )
    unfinished = Unfinished(Path(os.path.realpath(args.out)))
    stay_offline(args)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=NOISY)  # of packages, about each other
    config = model_config(args)
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    length = args.length or min(DEFAULT_LENGTH, context)
    tokenizer = model_tokenizer(args)
    samples = read_samples(args, tokenizer, length)
    model = open_model(args, step_nbytes(config, settings, length))
    with closing(model.layer_streamer):
        if args.plan:
            say(str(model.layer_streamer.plan))
        record = {
            **settings.record(), "model": model_name(args), "dtype": str(model.dtype),
            "rows": digest(samples[0]), "rows that are held out": digest(samples[1]),
        }  # fmt: skip
        unfinished.begin(record, anew=args.restart)
        try:
            made, watch = _train(args, model, tokenizer, samples, settings, unfinished)
        except BaseException:
            if unfinished.give_up():
                say(f"{unfinished.folder} is kept: the same command goes on with it")
            raise
        unfinished.finish(made)
    for line in watch.lines():
        say(line)
    print(printable(str(args.out)), flush=True)


def require_trainer() -> None:
    """ImportError, with what to install, if what training cannot do without is missing."""
    for name in NEEDED:
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed (pip install 'layer-streamer[finetune]')")


def model_config(args: argparse.Namespace) -> Any:
    """What transformers says of the language model. ValueError if it says nothing."""
    import transformers

    from ..llm.errors import one_line_errors
    from ..modules.hub import is_hub_folder, local_folder

    folder = local_folder(args.model)
    if not is_hub_folder(folder):
        hint = (
            " (examples/make/gguf_to_safetensors.py makes one)" if folder.suffix == ".gguf" else ""
        )
        raise ValueError(f"{args.model}: no directory of transformers': has no config.json{hint}")
    with one_line_errors(f"{args.model}: no config that can be read", ValueError):
        return transformers.AutoConfig.from_pretrained(folder).get_text_config()


def open_model(args: argparse.Namespace, step_nbytes: int) -> Any:
    """The model, streamed, ``step_nbytes`` of the device left where nobody says what it may take.

    ValueError for one that says no text, or for a device that is none.
    """
    import torch

    from ..measuring.threads import leave_a_core
    from ..modules.stream import stream

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda", "cuda:0"):
        raise ValueError(f"--device {device}: cuda or cpu (CUDA_VISIBLE_DEVICES says which GPU)")
    name = args.dtype or ("float32" if device == "cpu" else None)
    dtype = getattr(torch, name) if name else None
    options = streamer_options(args) | {"device": device}
    if device != "cpu" and options.get("device_budget") in (None, "auto"):
        options = {"reserve_bytes": step_nbytes} | options
    with leave_a_core():
        model: Any = stream(args.model, dtype=dtype, **options)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        model.layer_streamer.close()
        raise ValueError(f"{args.model}: a {type(model).__name__}, which generates no text")
    if model.config.is_encoder_decoder:
        model.layer_streamer.close()
        raise ValueError(f"{args.model}: an encoder with a decoder, for which rows have no meaning")
    return model


def model_tokenizer(args: argparse.Namespace) -> Any:
    """ValueError if there is none."""
    import transformers

    from ..llm.errors import one_line_errors
    from ..modules.hub import local_folder

    with one_line_errors(f"{args.model}: no tokenizer that can be read", ValueError):
        return transformers.AutoTokenizer.from_pretrained(local_folder(args.model))


def model_name(args: argparse.Namespace) -> str:
    """What an adapter says that it is of."""
    path = Path(args.model).expanduser()
    return os.path.realpath(path) if path.exists() else args.model


def read_samples(
    args: argparse.Namespace, tokenizer: Any, length: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """What is learned, and what is held out. ValueError, naming file and line."""
    from ..llm.finetuning.rows import read_rows
    from ..llm.finetuning.samples import encode_rows
    from ..llm.finetuning.training import hold_out

    def read(path: Path) -> list[Sample]:
        found = encode_rows(tokenizer, read_rows(path), path, length)
        tell_of_rows(path, found, length)
        return found.samples

    learned = read(args.data)
    if args.hold_out is not None:
        if not 0 < args.hold_out < 1:
            raise ValueError(f"--hold-out {args.hold_out}: must be between 0 and 1")
        return hold_out(learned, args.hold_out, args.seed)
    return learned, read(args.eval) if args.eval is not None else []


def tell_of_rows(path: Path, found: Samples, length: int) -> None:
    """How many rows there are, and what is not learned of them."""
    tokens = sum(len(sample.ids) for sample in found.samples)
    learned = sum(sample.learned for sample in found.samples)
    say(f"{path}: {len(found.samples):,} rows, {tokens:,} tokens, {learned:,} of them learned")
    if found.longer:
        say(f"{path}: {found.longer:,} rows are longer than {length} tokens: cut (--length)")
    if found.unlearned:
        say(
            f"{path}: {len(found.unlearned):,} rows are left out, as nothing of them is learned "
            f"within {length} tokens (line {found.unlearned[0]} is the first)"
        )


def _train(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    settings: Settings,
    unfinished: Unfinished,
) -> tuple[Any, Watch]:
    """Train with a progress bar. StreamerError if the device's memory does not do."""
    import torch

    from ..llm.errors import one_line_errors
    from ..llm.finetuning.training import adapted, arguments_for, train
    from ..llm.finetuning.watching import Watch
    from ..measuring.threads import leave_a_core
    from ..progress import ProgressBar

    if (last := unfinished.last_checkpoint()) is not None:
        say(f"going on from {Path(last).name}")
    with leave_a_core(), ProgressBar(leave=False, disable=None, bar_format=BAR) as bar:

        def tell(step: int, steps: int, figures: Mapping[str, float]) -> None:
            bar.total = steps
            bar.set_postfix(
                {name: f"{value:.4g}" for name, value in figures.items()}, refresh=False
            )
            bar.update(step - bar.n)

        watch = Watch(reports=lambda: model.layer_streamer.last_pass, tell=tell)
        with one_line_errors("peft refuses the adapter", ValueError):
            made = adapted(model, settings, model_name(args))
        arguments = arguments_for(model, settings, unfinished.folder, looks=bool(samples[1]))
        pad = tokenizer.pad_token_id
        try:
            train(made, arguments, 0 if pad is None else pad, samples, watch, last)
        except torch.OutOfMemoryError as error:
            raise StreamerError(
                "out of device memory in a step: lower --length, --batch or --device-budget, or "
                "raise --reserve-bytes"
            ) from error
    return made, watch
