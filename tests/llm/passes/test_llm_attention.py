import math

import pytest
import torch

from layer_streamer.llm.passes.attention import (
    attend,
    attend_masked,
    attend_rows,
    fast_kernels,
    window_mask,
)


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


def naive_with_sinks(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], window: int | None, sinks: torch.Tensor
) -> torch.Tensor:
    """The same with a score a head that adds no values."""
    q, k, v = (x.double() for x in qkv)
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    mask = window_mask(q.shape[1], k.shape[1], window or k.shape[1], torch.device("cpu"))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).exp() * mask
    return weights @ v / (weights.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (1, 7), (7, 7), (3, 7)])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_a_sink_takes_its_share_of_every_query_of_its_head(dtype, tokens, positions, window):
    torch.manual_seed(5)
    q, k, v = (
        torch.randn(n, p, 8).to(dtype) for n, p in ((6, tokens), (2, positions), (2, positions))
    )
    sinks = torch.tensor([0.0, -30.0, 2.0, 30.0, -1.0, 5.0]).to(dtype)
    expected = naive_with_sinks((q, k, v), window, sinks)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    found = attend(q, k, v, scale=8**-0.5, window=window, sinks_H=sinks)
    mask = window_mask(tokens, positions, window or positions, q.device)
    masked = attend_masked(q, k, v, mask, scale=8**-0.5, sinks_H=sinks)
    for mixed in (found, masked):
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed.double(), expected, atol=near, rtol=near)


@pytest.mark.parametrize("seen", [[5, 5, 5], [1, 9, 4]])
def test_rows_that_decode_together_have_the_sinks_that_each_would_have_alone(seen):
    torch.manual_seed(1)
    places, sinks = max(seen), torch.randn(6)
    q, k, v = torch.randn(3, 6, 8), torch.randn(3, 2, places, 8), torch.randn(3, 2, places, 8)
    mask = torch.arange(places) < torch.tensor(seen)[:, None]
    found = attend_rows(q, k, v, mask, scale=0.3, sinks_H=sinks)
    for row, count in enumerate(seen):
        keys, values = k[row, :, :count], v[row, :, :count]
        alone = attend(q[row][:, None], keys, values, scale=0.3, sinks_H=sinks)[:, 0]
        torch.testing.assert_close(found[row], alone)


@pytest.mark.parametrize("seen", [[5, 5, 5], [1, 9, 4]])
def test_rows_that_decode_together_see_what_each_would_alone(seen):
    torch.manual_seed(1)
    places = max(seen)
    q, k, v = torch.randn(3, 6, 8), torch.randn(3, 2, places, 8), torch.randn(3, 2, places, 8)
    mask = torch.arange(places) < torch.tensor(seen)[:, None]
    found = attend_rows(q, k, v, mask, scale=0.3)
    for row, count in enumerate(seen):
        keys, values = k[row, :, :count], v[row, :, :count]
        alone = attend(q[row][:, None], keys, values, scale=0.3)[:, 0]
        torch.testing.assert_close(found[row], alone)


@pytest.mark.parametrize(("tokens", "positions"), [(1, 30), (7, 7), (3, 30)])
@pytest.mark.parametrize("window", [None, 5])
def test_products_beyond_the_range_of_float16_are_scaled_before_they_leave_it(
    tokens, positions, window
):
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, n, 128) for n in (tokens, positions, positions))
    q, k, v = (x.half() for x in (q + 100, k + 100, v))
    found = attend(q, k, v, scale=128**-0.5, window=window)
    assert (q[0] @ k[0].T).isinf().any() and found.isfinite().all()
    expected = naive(q.float(), k.float(), v.float(), window)
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (1, 7), (3, 7), (12, 12), (40, 40)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("spoiled", ["query", "key", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_none_in_the_result(dtype, tokens, positions, window, spoiled, value):
    """Kernels may take it for what a mask has ruled out, and give zeros."""
    q, k, v = (torch.randn(2, n, 8).to(dtype) for n in (tokens, positions, positions))
    {"query": q, "key": k, "value": v}[spoiled][:, -1, 3] = value
    if spoiled == "key" and value == math.inf:
        q = q.abs()  # else what is seen of it is -inf, and rightly nothing
    assert not attend(q, k, v, scale=1.0, window=window)[:, -1].isfinite().any() or (
        spoiled == "value"
    )
    if spoiled == "value":
        assert not attend(q, k, v, scale=1.0, window=window)[:, -1, 3].isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 700), (512, 512), (300, 900)])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_gpu_sees_the_same_positions(dtype, tokens, positions, window, width):
    torch.manual_seed(2)
    memory = torch.randn(positions, 2, 2, width)
    q = torch.randn(8, tokens, width)
    k, v = memory[:, 0].transpose(0, 1), memory[:, 1].transpose(0, 1)
    expected = attend(q, k, v, scale=width**-0.5, window=window)
    there = memory.to("cuda", dtype)
    k, v = there[:, 0].transpose(0, 1), there[:, 1].transpose(0, 1)
    with fast_kernels(there.device):
        found = attend(q.to("cuda", dtype), k, v, scale=width**-0.5, window=window)
    found = found.cpu().float()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_a_prefill_chunk_on_a_gpu_makes_no_matrix_of_scores():
    tokens, positions = 2048, 16384
    memory = torch.randn(positions, 2, 4, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(28, tokens, 128, device="cuda", dtype=torch.bfloat16)
    k, v = memory[:, 0].transpose(0, 1), memory[:, 1].transpose(0, 1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with fast_kernels(q.device):
        attend(q, k, v, scale=0.1)
    # Scores would take 28 * 2048 * 16384 * 2 bytes, expanded keys 28 / 4 times the cache.
    assert torch.cuda.max_memory_allocated() - before < 4 * q.nbytes
