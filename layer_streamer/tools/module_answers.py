"""Answers of models that the engine does not compute: transformers' own code over streamed weights.

Only the generated text goes to stdout, as it comes.
"""

from __future__ import annotations

import argparse
from typing import Any

from .command import require_engine, say, streamer_options
from .engine_options import ENGINE, GENERATION, given, template_options

DRAWS = ("top_k", "top_p", "min_p")
"""Options that mean that tokens are drawn."""


def answer_with_modules(args: argparse.Namespace, text: str) -> None:
    """Generate with the model's own class. ValueError for options that are the engine's."""
    require_engine()
    for name in (*ENGINE, "timeline"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: the engine's, which --modules does without")
    import torch
    import transformers

    from ..modules.stream import stream

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model: Any = stream(args.model, dtype=dtype, **streamer_options(args))
    if not model.can_generate():
        raise ValueError(f"{args.model}: a {type(model).__name__}, which generates no text")
    if args.plan:
        say(str(model.layer_streamer.plan))
    ids = _encode(tokenizer, text, args).to(model.device)
    show = args.skip_special_tokens is not None
    printer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=not show)
    with torch.no_grad():
        model.generate(ids, streamer=printer, tokenizer=tokenizer, **_generation(args, tokenizer))
    for name, report in model.layer_streamer.last_pass.items():
        say(f"{name}: the last pass\n{report}")
    model.layer_streamer.close()


def _encode(tokenizer: Any, text: str, args: argparse.Namespace) -> Any:
    """Tokens of the prompt, shape (1, tokens)."""
    if args.raw or not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        **template_options(args),
    )["input_ids"]


def _generation(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What was asked for, in transformers' words."""
    import torch

    asked = given(args, GENERATION)
    asked.pop("skip_special_tokens", None)
    if (seed := asked.pop("seed", None)) is not None:
        torch.manual_seed(seed)
    if stop := asked.pop("stop", None):
        asked["stop_strings"] = stop
    if asked.get("temperature") == 0:
        asked = {name: value for name, value in asked.items() if name not in DRAWS}
        asked |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    elif "temperature" in asked or any(name in asked for name in DRAWS):
        asked["do_sample"] = True
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {"pad_token_id": pad, **asked}
