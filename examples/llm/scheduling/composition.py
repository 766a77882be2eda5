"""Who takes part in a pass, with how many tokens.

Rows that decode come first, each with its draft. Prompts get what is left, the oldest first: all of
it where no row decodes, else no more than lengthens the pass by a share (:mod:`.allowance`). So a
prompt may be taken in several passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..drafts.drafting import Drafting
from ..drafts.tree import NOTHING
from ..request import Request
from .allowance import Allowance


@dataclass(frozen=True, slots=True)
class Composition:
    """Of one pass."""

    taking: Sequence[Request]
    """Those that take part, each with its ``part``. Rows that take one token lie together, in the
    first chunk."""
    decoding: int
    """Tokens of rows that decode, drafts among them."""
    prompts: int
    """Tokens of prompts."""
    context: int
    """Tokens that are there before the oldest prompt's part."""


def compose(
    running: Sequence[Request],
    most: int,
    alike: float,
    drafting: Drafting | None,
    allowance: Allowance,
) -> Composition:
    """The next pass over these rows, the oldest first; ``most``: tokens that it has room for.

    A prompt of more tokens than ``alike`` is taken as a whole, as soon as there is room for it:
    until rows that decode have ended, if need be, and no younger prompt is taken meanwhile.
    """
    for request in running:
        request.part, request.draft = 0, NOTHING
    decoding = [request for request in running if request.decodes]
    prompts = [request for request in running if not request.decodes]
    if drafting is not None:
        drafting.propose(running, most - len(decoding))
    for request in decoding:
        request.part = request.behind
    tokens = sum(request.part for request in decoding)
    context = prompts[0].row.length if prompts and prompts[0].row is not None else 0
    allowed = room = most - tokens
    if decoding and prompts:
        allowed = min(room, allowance.tokens(tokens, context))
    share(prompts, allowed, room, alike)
    taking = sorted((r for r in running if r.part), key=lambda request: request.part)
    return Composition(taking, tokens, sum(request.part for request in prompts), context)


def share(prompts: Sequence[Request], allowed: int, room: int, alike: float) -> None:
    """Give each prompt its part of what is allowed, the oldest first; ``room``: the most there
    is."""
    for request in prompts:
        if allowed <= 0:
            return
        request.part = min(request.behind, allowed)
        if len(request.prompt_ids) > alike:
            if request.behind > room:
                request.part = 0
                return
            request.part = request.behind
        allowed, room = allowed - request.part, room - request.part
