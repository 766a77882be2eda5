"""A sampler with a constraint chooses what may follow, and its errors are its row's."""

from __future__ import annotations

import pytest
import torch
from byte_model import VOCABULARY, byte_tokenizer
from documents import matcher_of

from layer_streamer.llm.constraints.vocabulary import Vocabulary
from layer_streamer.llm.text.sampling import Sampler, Sampling, choose_tokens


class Refusing:
    """A constraint that nothing satisfies."""

    acts = True

    def mask(self, scores_V: torch.Tensor) -> torch.Tensor:
        raise ValueError("nothing may follow")

    def accept(self, token: int) -> None: ...
    def ends_at(self, count: int) -> bool:
        return False

    def forced(self) -> list[int]:
        return []


def test_what_a_constraint_raises_is_its_rows_alone() -> None:
    known = Vocabulary(byte_tokenizer(), VOCABULARY)
    held = matcher_of(known, regex="q+")
    samplers = [Sampler(), Sampler(constraint=Refusing()), Sampler(constraint=held)]
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    likeliest, refused, chosen = choose_tokens(logits, samplers)
    assert likeliest == int(logits[0].argmax()) and chosen == ord("q")
    assert isinstance(refused, ValueError)


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("size", [1.0, 1e38])
def test_no_temperature_and_no_logits_let_another_token_through(
    temperature: float, size: float
) -> None:
    known = Vocabulary(byte_tokenizer(), VOCABULARY)
    matcher = matcher_of(known, regex="[xyz]{200}")
    sampling = Sampling(temperature=temperature, repetition_penalty=1.5)
    sampler = Sampler(sampling, seed=1, constraint=matcher)
    sampler.see([120])
    dice = torch.Generator().manual_seed(0)
    for _ in range(100):
        logits = torch.randn(VOCABULARY, generator=dice) * size
        logits[ord("x") : ord("z")] = -torch.inf
        assert sampler.take(int(sampler.choose(logits))) in (*b"xyz",)


def test_a_row_with_a_constraint_does_not_take_the_models_likeliest_token() -> None:
    assert Sampler().takes_likeliest
    assert not Sampler(constraint=Refusing()).takes_likeliest


def test_a_row_that_is_held_draws_one_number_a_token_as_others_do() -> None:
    """So what is drawn behind a constraint is what would be drawn there without one."""
    known = Vocabulary(byte_tokenizer(), VOCABULARY)
    sampling = Sampling(temperature=1.0)
    held = Sampler(sampling, seed=7, constraint=matcher_of(known, regex="abc(?s:.)*"))
    free = Sampler(sampling, seed=7)
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[3, 128:] = -torch.inf  # bytes that are characters by themselves
    found = [held.take(int(held.choose(row))) for row in logits]
    assert bytes(found[:3]) == b"abc"
    assert found[3] == [int(free.choose(row)) for row in logits][3]
