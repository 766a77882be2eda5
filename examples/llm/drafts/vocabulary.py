"""Whether two models mean the same by their token ids."""

from __future__ import annotations

from collections.abc import Mapping

from ..opening import Model

MOST_DIFFERENT = 128
"""Ids that may stand for other tokens: families rename what they reserve for special ones."""


def common_vocabulary(target: Model, draft: Model) -> int:
    """How many ids both models have; those beyond are none of either's text.

    ValueError, naming the first, if more than MOST_DIFFERENT of them are other tokens, or if one of
    the models alone has a tokenizer. Of two without any, ids are taken as they are.
    """
    count = min(target.config.vocab_size, draft.config.vocab_size)
    mine, its = _tokens(target), _tokens(draft)
    if mine is None and its is None:
        return count
    if mine is None or its is None:
        without = target if mine is None else draft
        raise ValueError(
            f"draft={str(draft.path)!r}: {without.path} has no tokenizer, so that nothing says "
            "whether both models have the same tokens"
        )
    both = [i for i in range(count) if i in mine and i in its]
    different = [i for i in both if mine[i] != its[i]]
    if len(different) > min(MOST_DIFFERENT, len(both) // 2):
        i = different[0]
        raise ValueError(
            f"draft={str(draft.path)!r}: {len(different):,} of {len(both):,} ids are other tokens "
            f"than the model's (id {i}: {its[i]!r}, the model's {mine[i]!r}): a draft needs the "
            "same tokenizer"
        )
    return count


def _tokens(model: Model) -> Mapping[int, str] | None:
    """By id; None for a model without a tokenizer that can be used."""
    try:
        tokenizer = model.tokenizer
    except (ValueError, ImportError):
        return None
    return {i: token for token, i in tokenizer.get_vocab().items()}
