"""Talk with a language model whose layers stream through bounded memory.

    layer-streamer chat MODEL --device-budget 6GiB

Answers go to stdout, everything else to stderr, what the model thinks before it answers as well.
Where stdin is no terminal, each of its lines is a message. Exit code 2 is an error.
"""

from __future__ import annotations

import argparse

from ..llm.text.chat import DEFAULT_TOKENS, Chat, read_lines, run_chat
from .command import say
from .engine_options import (
    GENERATION,
    add_answering,
    add_engine,
    add_language_model,
    given,
    open_engine,
    read_model,
    save_timeline,
    template_options,
)
from .generate_command import voice_of
from .module_answers import ModuleChat, modules_answer, open_answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_language_model(parser)
    add_answering(parser, DEFAULT_TOKENS)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    """Answer what is typed, until the end of the input."""
    if args.modules:
        talk_with_modules(args)
        return
    from ..llm.errors import UnsupportedModelError

    try:
        model = read_model(args)
    except UnsupportedModelError as error:
        if not modules_answer(args):
            raise
        say(f"{error}: going on by the model's own class, of transformers (--modules)")
        talk_with_modules(args)
        return
    _ = model.tokenizer  # the error of a model without one, before it is opened
    from ..llm.text.terminal import open_reader

    with open_engine(args, model) as engine:
        options = given(args, GENERATION) | {"chat_template_kwargs": template_options(args)}
        voice = voice_of(args)
        run_chat(Chat(engine, voice.say, options, voice.think), read_lines(open_reader()), say)
        save_timeline(args, engine)


def talk_with_modules(args: argparse.Namespace) -> None:
    """The same with transformers' class of the model, whose weights stream."""
    from ..llm.text.terminal import open_reader

    with open_answers(args) as answers:
        if not answers.has_template:
            say("the model has no chat template: continuing the conversation as it is")
        voice = voice_of(args)
        run_chat(ModuleChat(answers, voice.say, voice.think), read_lines(open_reader()), say)
