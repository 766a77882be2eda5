"""Which family a model is of, told by its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from secrets import choice, token_hex
from string import ascii_letters, digits
from typing import Any

from .coder import FUNCTION, Coder
from .forced import Forced
from .found import CallParser
from .generic import Generic
from .harmony import Harmony
from .heads import CHANNEL
from .hermes import OPENING, Hermes
from .llama import TAG, Llama
from .mistral import MARK, Mistral

HARMONY = "harmony"
"""Calls, reasoning and the answer are in channels."""
MARKS = {
    HARMONY: CHANNEL, "coder": FUNCTION, "hermes": OPENING, "mistral": MARK, "llama": TAG,
}  # fmt: skip
"""What a family's template says that no other's before it does."""


def family_of(template: str | None) -> str:
    """ "generic" if its template says nothing of tools."""
    text = template or ""
    for family, mark in MARKS.items():
        if mark in text:
            return family
    return "llama" if "ipython" in text and '"parameters"' in text else "generic"


def parser_of(
    family: str, tools: Sequence[Mapping[str, Any]], *, forced: bool, lead: str = ""
) -> CallParser:
    """A new one, for one text. ``lead``: the head in which the prompt ends, where a family has
    such."""
    if family == HARMONY:
        return Harmony({tool["function"]["name"] for tool in tools}, lead)
    if forced:
        return Forced()
    if family == "coder":
        return Coder(tools)
    kinds: dict[str, Callable[[], CallParser]] = {
        "hermes": Hermes, "mistral": Mistral, "llama": Llama, "generic": Generic,
    }  # fmt: skip
    return kinds[family]()


def shows_special(family: str) -> bool:
    """True: calls are marked by special tokens, which are to come with the text."""
    return family in ("llama", "mistral", HARMONY)


def new_call_id(family: str) -> str:
    """Of one call. Mistral's templates take nine letters and digits alone."""
    if family == "mistral":
        return "".join(choice(ascii_letters + digits) for _ in range(9))
    return f"call_{token_hex(12)}"
