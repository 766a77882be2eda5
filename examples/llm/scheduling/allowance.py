"""How many tokens of prompts a pass takes beside rows that decode: as many as are nearly free."""

from __future__ import annotations

from dataclasses import dataclass

from ..drafts.pace import Pace
from ..kv.blocks import BLOCK

SHARE = 0.3
"""Of a pass that only decodes: how much longer one may take with prompts."""
AIM = 0.2
"""And how much longer it is to take, so that one that turns out slower stays within that."""
AGAIN = 64
"""Passes with prompts after which one is done without, so that it is known how long that takes by
now; and after which what was too long is tried again."""


@dataclass(slots=True)
class _Measured:
    """The last pass that told something, of those whose oldest prompt was about as far."""

    tokens: int = 0
    """Of prompts."""
    ratio: float = 1.0
    """Its seconds, by those of a pass that only decodes."""
    too_many: int = 0
    """So many tokens took too long lately; 0: none did."""
    passes: int = 0
    """Since then."""


class Allowance:
    """Goes by passes that were measured, not by a model of the machine.

    Weights that stream hide what is computed meanwhile, up to a number of tokens that depends on
    link, device and how far back a prompt looks. So that number is felt for: from a block on, by as
    much more as keeps a pass within its share even if all of its time went by its tokens; and by
    less as soon as a pass takes longer. What is known is kept by how far the oldest prompt is, from
    one power of two to the next. Thread rules: one thread.
    """

    def __init__(self) -> None:
        self._plain = Pace()
        self._since_plain = 0
        self._measured: dict[int, _Measured] = {}

    def tokens(self, decoding: int, context: int) -> int:
        """How many tokens of prompts a pass may take beside so many of rows that decode, in blocks,
        one at least; 0: none for once, so that it is known how long a pass takes without.

        ``context``: tokens that are there before the oldest prompt's part.
        """
        if not self._plain.knows(decoding) or self._since_plain >= AGAIN:
            return 0
        known = self._nearest(context)
        if known.ratio > 1 + AIM:
            most = known.tokens * AIM / (known.ratio - 1)
        else:
            most = known.tokens * (1 + AIM) / max(known.ratio, 1.0)
            more = known.tokens + BLOCK
            within = (known.ratio - 1) * more <= AIM * known.tokens
            if within and not 0 < known.too_many <= more:
                most = max(most, more)  # a few blocks would never grow by less than one
        return max(int(most) // BLOCK, 1) * BLOCK

    def hear(self, decoding: int, prompts: int, context: int, seconds: float) -> None:
        """A pass of so many tokens of rows that decode and so many of prompts took so long."""
        if not decoding:
            return
        if not prompts:
            self._plain.hear(decoding, seconds)
            self._since_plain = 0
            return
        plain, allowed = self._plain.seconds(decoding), self.tokens(decoding, context)
        self._since_plain += 1
        known = self._nearest(context)
        ratio, too_many, passes = seconds / max(plain, 1e-9), known.too_many, known.passes + 1
        if ratio > 1 + SHARE:
            too_many, passes = prompts, 0
        elif passes > AGAIN:
            too_many = 0
        if ratio > 1 + AIM or prompts >= allowed:
            found = _Measured(prompts, ratio, too_many, passes)
        else:  # fewer than it might have taken tell nothing
            found = _Measured(known.tokens, known.ratio, too_many, passes)
        self._measured[_depth(context)] = found

    def _nearest(self, context: int) -> _Measured:
        """What is known of prompts that are about as far, or less."""
        less = [depth for depth in self._measured if depth <= _depth(context)]
        return self._measured[max(less)] if less else _Measured()


def _depth(context: int) -> int:
    return (context // BLOCK).bit_length()
