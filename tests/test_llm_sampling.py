import math

import pytest
import torch

from llm.sampling import Sampler


def draws(sampler: Sampler, logits: torch.Tensor, count: int = 200) -> list[int]:
    return [sampler(logits) for _ in range(count)]


def test_temperature_zero_takes_the_largest_logit():
    assert Sampler()(torch.tensor([0.0, 3.0, 2.9])) == 1


def test_the_same_seed_gives_the_same_draws():
    logits = torch.randn(50)
    assert draws(Sampler(1.0, seed=5), logits) == draws(Sampler(1.0, seed=5), logits)


def test_two_samplers_without_a_seed_differ():
    logits = torch.zeros(1000)
    assert draws(Sampler(1.0), logits, 20) != draws(Sampler(1.0), logits, 20)


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 2.0, -100.0]) * math.log(2) / 2
    counts = torch.bincount(torch.tensor(draws(Sampler(0.5, seed=0), logits, 3000)), minlength=3)
    assert counts[2] == 0
    assert abs(counts[1] / counts[0] - 4.0) < 0.5


@pytest.mark.parametrize("temperature", [-0.1, float("inf"), float("nan")])
def test_a_temperature_that_is_none_is_an_error(temperature):
    with pytest.raises(ValueError, match="temperature="):
        Sampler(temperature)
