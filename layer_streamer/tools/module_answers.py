"""Answers of models that the engine does not compute: transformers' own code over streamed weights.

Only the answer goes to stdout, as it comes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from ..llm.errors import PromptTooLongError, one_line_errors
from ..llm.reading.choice_text import Delta
from ..llm.reading.reader import Reader
from ..llm.text.conversation import Conversation, Put, Turn, ended_at
from .command import require_engine, say, streamer_options
from .engine_options import (
    ENGINE,
    GENERATION,
    OF_OPENAI,
    given,
    stay_offline,
    template_options,
)
from .voice import Voice

DRAWS = ("top_k", "top_p", "min_p")
"""Options that mean that tokens are drawn."""


class ModuleAnswers:
    """A streamed model of transformers and its tokenizer. Thread rules: one thread."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.model, self._tokenizer, self._args = model, tokenizer, args
        self._generation = _generation(args, tokenizer)
        text = model.config.get_text_config(decoder=True)
        found = getattr(text, "max_position_embeddings", None)
        self.length: int | None = None if model.config.is_encoder_decoder else found
        """Most tokens of a prompt and its answer; None: there is no such number."""

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, prompt: str | list[Turn]) -> Any:
        """Tokens of a text, or of messages by the chat template, shape (1, tokens). ValueError, in
        one line, for what tokenizer or template refuse."""
        with one_line_errors("the tokenizer cannot take the prompt", ValueError):
            if isinstance(prompt, str):
                return self._tokenizer(prompt, return_tensors="pt").input_ids
            return self._tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                **template_options(self._args),
            )["input_ids"]

    def answer(self, ids: Any, tell: Callable[[Delta], None], *, raw: bool = False) -> str:
        """Generate, word by word; returns why the text ended early, "" if all was said.

        ``raw``: the prompt is none of the chat template's, and its text is told as it is.
        PromptTooLongError if the model has no room for a single token.
        """
        import torch
        import transformers

        most, count = self._args.max_new_tokens, ids.shape[1]
        room = most if self.length is None else min(most, self.length - count)
        if room < 1:
            raise PromptTooLongError(f"{count} tokens, the model's context is {self.length}")
        if self._args.seed is not None:
            torch.manual_seed(self._args.seed)
        reader = Reader(self._tokenizer, given(self._args, ("skip_special_tokens",)), raw=raw)
        read, skips = reader.text(ids[0].tolist()), {"skip_special_tokens": True, **reader.options}
        printer: Any = transformers.TextStreamer(self._tokenizer, skip_prompt=True, **skips)
        printer.on_finalized_text = lambda text, stream_end=False: tell(read.push(text))
        with torch.no_grad():
            found = self.model.generate(
                ids.to(self.model.device),
                streamer=printer,
                tokenizer=self._tokenizer,
                **{**self._generation, "max_new_tokens": room},
            )
        tell(read.finish())
        before = 1 if self.model.config.is_encoder_decoder else count
        ends = self.model.generation_config.eos_token_id
        said = found.shape[1] - before
        if said < room or int(found[0, -1]) in (ends if isinstance(ends, list) else [ends]):
            return ""
        return ended_at(room, most, self.length or 0)


class ModuleChat(Conversation):
    """A conversation with a model's own class."""

    def __init__(self, answers: ModuleAnswers, write: Put, think: Put = lambda text: None) -> None:
        super().__init__(write, think)
        self._answers = answers

    def speak(self, messages: list[Turn], put: Put) -> str:
        """The model's answer to a conversation; without a chat template, it goes on with it."""
        answers = self._answers
        if answers.has_template:
            ids = answers.encode(messages)
        else:
            ids = answers.encode("\n".join(turn["content"] for turn in messages))
        return answers.answer(ids, lambda delta: self.tell(delta, put))


def answer_with_modules(args: argparse.Namespace, prompt: str | list[Turn], voice: Voice) -> None:
    """Answer one prompt with the model's own class. ValueError for options of the engine."""
    with open_answers(args) as answers:
        if not isinstance(prompt, str) and not answers.has_template:
            prompt = prompt[0]["content"]
        answers.answer(answers.encode(prompt), voice.tell, raw=isinstance(prompt, str))
        voice.end()
        say("")
        handle = answers.model.layer_streamer
        for name, report in handle.last_pass.items():
            say(f"{name}: the last pass\n{report}")
        for name, found in handle.last_experts.items():
            say(f"{name}: of {found.asked} experts, {found.hits} were in their slots")


@contextmanager
def open_answers(args: argparse.Namespace) -> Iterator[ModuleAnswers]:
    """Context with the model that the arguments name, streamed, and its tokenizer.

    ValueError for options that are the engine's, and a model that generates no text.
    """
    require_engine()
    for name in (*ENGINE, *OF_OPENAI, "timeline"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: the engine's, which --modules does without")
    stay_offline(args)
    import torch
    import transformers

    from ..llm.hub import PREFIX
    from ..measuring.threads import leave_a_core
    from ..modules.hub import local_folder
    from ..modules.stream import stream

    folder = local_folder(args.model.removeprefix(PREFIX))
    with one_line_errors(f"{folder}: no tokenizer that can be read", ValueError):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with leave_a_core():
        model: Any = stream(folder, dtype=dtype, **streamer_options(args))
        with closing(model.layer_streamer):
            if not (hasattr(model, "can_generate") and model.can_generate()):
                raise ValueError(f"{args.model}: a {type(model).__name__}, which generates no text")
            if args.plan:
                say(str(model.layer_streamer.plan))
            yield ModuleAnswers(model, tokenizer, args)


def modules_answer(args: argparse.Namespace) -> bool:
    """True if transformers has a class that generates text with a model that the engine refuses."""
    from ..errors import StreamerError
    from ..llm.hub import find_model
    from ..modules.hub import class_of, is_hub_folder

    folder = find_model(args.model)
    if not is_hub_folder(folder):
        return False
    try:
        cls = class_of(folder)
    except StreamerError:
        return False
    # An auto class is one for text.
    return not hasattr(cls, "can_generate") or bool(cls.can_generate())


def _generation(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What was asked for, in transformers' words."""
    asked = given(args, GENERATION)
    for name in ("skip_special_tokens", "seed"):
        asked.pop(name, None)
    if stop := asked.pop("stop", None):
        asked["stop_strings"] = stop
    if asked.get("temperature") == 0:
        asked = {name: value for name, value in asked.items() if name not in DRAWS}
        asked |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    elif "temperature" in asked or any(name in asked for name in DRAWS):
        asked["do_sample"] = True
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {"pad_token_id": pad, **asked}
