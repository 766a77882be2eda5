"""The tokens of each row after a pass that has looked at a draft of it, or at none.

The target decides, whatever was drafted: at each token of the draft the row's own sampler chooses
from the target's logits, as it would without a draft, and goes on while it chooses one of those
that were drafted to follow it (SpecExec, arXiv 2406.02532). So the text is the one without drafts,
for every draft; and a row draws one random number for each token that it gets, so the same seed
gives the same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..drafts.tree import ROOT, Tree
from .logprobs import measure, read
from .sampling import Sampler, choose_tokens

Followed = list[int | Exception]
"""A row's tokens, the last of them perhaps what its sampler raised in its place. Empty: its logits
are not numbers from the first on."""


def follow(
    logits_NV: torch.Tensor, samplers: Sequence[Sampler], drafts: Sequence[Tree]
) -> list[Followed]:
    """What follows in every row. Waits for the device, and with a draft of a row that draws, once
    for each token that it gets, and once for the logprobs of a row that asks for them.

    ``logits_NV``: of each row, packed, what follows its last token that is no draft, and what
    follows each token of its draft. A row ends before logits that are not numbers, which the next
    pass finds.
    """
    if not any(drafts):
        choices = choose_tokens(logits_NV, samplers)
        return [[] if choice is None else [choice] for choice in choices]
    largest_N, likeliest_N = logits_NV.float().max(-1)
    largest, likeliest = largest_N.tolist(), likeliest_N.tolist()
    found, first = [], 0
    for sampler, draft in zip(samplers, drafts, strict=True):
        part = slice(first, first + 1 + len(draft))
        found.append(_follow(logits_NV[part], sampler, draft, (largest[part], likeliest[part])))
        if sampler.top_logprobs is not None:
            _tell(logits_NV[part], sampler, draft, found[-1])
        first = part.stop
    return found


def _follow(
    logits_CV: torch.Tensor,
    sampler: Sampler,
    draft: Tree,
    ahead: tuple[list[float], list[int]],
) -> Followed:
    """One row's. ``ahead``: of each of its logits the largest, and which token that is."""
    tokens: Followed = []
    node: int | None = ROOT
    while node is not None and math.isfinite(ahead[0][1 + node]):
        try:
            takes = sampler.takes_likeliest
            token = ahead[1][1 + node] if takes else int(sampler.choose(logits_CV[1 + node]))
            choice = sampler.take(token)
        except Exception as error:  # of this row: the others go on
            tokens.append(error)
            break
        tokens.append(choice)
        node = None if isinstance(choice, Exception) else draft.child(node, choice)
    return tokens


def _tell(logits_CV: torch.Tensor, sampler: Sampler, draft: Tree, tokens: Followed) -> None:
    """Have the row's sampler keep how likely its tokens were, each behind those before it; an error
    takes the place of all of them."""
    chosen = [token for token in tokens if isinstance(token, int)]
    try:
        ids = torch.tensor(chosen, dtype=torch.long, device="cpu").to(logits_CV.device)
        behind = zip([ROOT, *draft.path(chosen)], ids, strict=False)
        numbers = [
            measure(logits_CV[1 + node], token, sampler.top_logprobs or 0) for node, token in behind
        ]
        found = torch.stack(numbers).tolist() if numbers else []
    except Exception as error:  # of this row: the others go on
        tokens[:] = [error]
    else:
        sampler.logprobs += map(read, chosen, found)
