"""A tokenizer that transformers has made, used without transformers, which takes seconds to import.

Only one of which :func:`describe` has found that nothing is lost by it: what transformers computes
with is then the file tokenizer.json, and a template that Jinja renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import optional_packages

DESCRIPTION = "direct.json"
"""Beside tokenizer.json; what it does not say: the template, the special tokens."""
TAG_OF_TRANSFORMERS = re.compile(r"\{%[-+]?\s*generation\b")
"""Of templates for training, which Jinja does not know."""
OPTIONS_OF_TRANSFORMERS = frozenset({
    "tools", "documents", "chat_template", "continue_final_message", "sanitize_control_tokens",
    "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "conversation", "messages",
})  # fmt: skip
"""Options of apply_chat_template that are not simply handed to the template."""


def describe(tokenizer: Any, directory: Path) -> dict[str, Any] | None:
    """What DirectTokenizer needs beside the ``tokenizer.json`` of the directory; None if it would
    not do exactly what ``tokenizer``, transformers' own of that directory, does."""
    from tokenizers import Tokenizer

    path, backend = directory / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    template = tokenizer.chat_template
    if backend is None or not path.is_file() or tokenizer.split_special_tokens:
        return None
    if not isinstance(template, str | None) or TAG_OF_TRANSFORMERS.search(template or ""):
        return None
    read = Tokenizer.from_file(str(path))
    if backend.truncation or backend.padding or backend.to_str() != read.to_str():
        return None
    return {
        "chat_template": template,
        "special_tokens": dict(tokenizer.special_tokens_map),
        "eos_token_id": tokenizer.eos_token_id,
    }


class DirectTokenizer:
    """Encodes, decodes and renders as transformers' tokenizer of the same directory does.

    What else is asked of it, that one answers, which is then loaded. Thread rules: those of
    transformers' tokenizers.
    """

    def __init__(
        self, directory: Path, description: Mapping[str, Any], load: Callable[[], Any]
    ) -> None:
        """``description`` is what :func:`describe` found; ``load()`` gives transformers' own."""
        with optional_packages():
            from tokenizers import Tokenizer
        self._backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._load, self._whole = load, None
        self._template: Any = None
        self.chat_template: str | None = description["chat_template"]
        self.eos_token_id: int | None = description["eos_token_id"]
        self._special: dict[str, str] = description["special_tokens"]

    @property
    def backend_tokenizer(self) -> Any:
        """That of the package tokenizers, which computes."""
        return self._backend

    @property
    def added_tokens_decoder(self) -> Any:
        """The tokens beside the vocabulary, by their ids: special ones and others."""
        return self._backend.get_added_tokens_decoder()

    def encode(self, text: Any, *, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """Token ids of a text."""
        if options or not isinstance(text, str):
            whole = self._of_transformers()
            ids: list[int] = whole.encode(text, add_special_tokens=add_special_tokens, **options)
        else:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, **options: Any
    ) -> Any:
        """The text of token ids."""
        if options == {"clean_up_tokenization_spaces": False} and isinstance(ids, list):
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self._of_transformers().decode(
            ids, skip_special_tokens=skip_special_tokens, **options
        )

    def apply_chat_template(
        self,
        messages: Any,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """The messages as the model's template writes them. Raises what the template raises."""
        if tokenize or self.chat_template is None or not _are_plain(messages, options):
            return self._of_transformers().apply_chat_template(
                messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt, **options
            )
        if self._template is None:
            self._template = compile_template(self.chat_template)
        return self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._special, **options},
        )

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._of_transformers()(*args, **options)

    def __len__(self) -> int:
        return len(self._of_transformers())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an object that is being made or copied
            raise AttributeError(name)
        return getattr(self._of_transformers(), name)

    def _of_transformers(self) -> Any:
        if self._whole is None:
            self._whole = self._load()
        return self._whole


def direct_tokenizer(directory: Path, load: Callable[[], Any]) -> DirectTokenizer | None:
    """The tokenizer of a directory that has a description, else None."""
    path = directory / DESCRIPTION
    if not path.is_file():
        return None
    return DirectTokenizer(directory, json.loads(path.read_text(encoding="utf-8")), load)


def _are_plain(messages: Any, options: Mapping[str, Any]) -> bool:
    """True for texts with roles and options that transformers hands to the template unchanged."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            type(m) is dict
            and set(m) == {"role", "content"}
            and all(type(v) is str for v in m.values())
            for m in messages
        )
        and all(type(value) in (str, int, float, bool) for value in options.values())
        and not OPTIONS_OF_TRANSFORMERS & set(options)
    )


def compile_template(text: str) -> Any:
    """A chat template, in a sandbox like that of transformers: templates come with models, and are
    programs of people whom nobody knows."""
    with optional_packages():
        from jinja2.exceptions import SecurityError, TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace

    class SafeNamespace(Namespace):
        """Keeps nothing by a name that Python has a meaning for."""

        def __init__(*args: Any, **values: Any) -> None:  # so that a value may be called self
            for name in dict(*args[1:], **values):
                check_name(name)
            Namespace.__init__(*args, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    class DictMaker:
        """``dict`` without its other attributes."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"{name!r}: a namespace keeps no name that begins with _")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": _strftime_now,
        "dict": DictMaker(),
        "namespace": SafeNamespace,
    }
    return environment.from_string(text)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, which writes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
