import math

import pytest
import torch
from assets import TINY
from transformers import LlamaConfig

from llm.attention import attend
from llm.config import ModelConfig, model_config
from llm.kv_cache import KVCache


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Attention of the last T positions, one query at a time."""
    heads, tokens, width = q.shape
    out = torch.empty_like(q)
    for h in range(heads):
        group = h // (heads // k.shape[0])
        for t in range(tokens):
            seen = k.shape[1] - tokens + t + 1
            first = 0 if window is None else max(0, seen - window)
            scores = k[group, first:seen] @ q[h, t] / math.sqrt(width)
            out[h, t] = scores.softmax(0) @ v[group, first:seen]
    return out


@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (1, 7), (7, 7), (3, 7), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 9])
def test_new_tokens_see_the_positions_of_their_window_up_to_their_own(
    tokens, positions, groups, window
):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(n, p, 8) for n, p in ((6, tokens), (groups, positions), (groups, positions))
    )
    found = attend(q, k, v, scale=8**-0.5, window=window)
    torch.testing.assert_close(found, naive(q, k, v, window))


def config() -> ModelConfig:
    return model_config(LlamaConfig(**TINY))


def new_cache() -> KVCache:
    return KVCache(config(), 8, dtype=torch.float32, device=torch.device("cpu"))


def test_appended_tokens_are_seen_after_those_before_them():
    cache = new_cache()
    first, second = torch.randn(2, 3, 16), torch.randn(2, 2, 16)
    for layer_idx in range(3):
        cache.append(layer_idx, first, -first)
    cache.advance(3)
    keys, values = cache.append(1, second, -second)
    assert torch.equal(keys, torch.cat((first, second), 1))
    assert torch.equal(values, -keys)


def test_tokens_that_were_not_made_permanent_are_overwritten():
    cache = new_cache()
    cache.append(0, torch.ones(2, 3, 16), torch.ones(2, 3, 16))
    keys, _ = cache.append(0, torch.zeros(2, 2, 16), torch.zeros(2, 2, 16))
    assert torch.equal(keys, torch.zeros(2, 2, 16))


def test_truncating_moves_the_length_only_and_never_forward():
    cache = new_cache()
    cache.advance(5)
    cache.truncate(2)
    assert cache.length == 2
    with pytest.raises(ValueError, match="length=3: the cache holds 2 tokens"):
        cache.truncate(3)


def test_the_cache_takes_the_bytes_of_its_keys_and_values():
    assert new_cache().nbytes == 3 * 2 * 2 * 8 * 16 * 4
