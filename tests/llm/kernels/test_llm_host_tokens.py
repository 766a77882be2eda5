"""What a processor's kernels make of few tokens beside products, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.host_kernels import tokens as kernels
from layer_streamer.llm.host_kernels.library import library
from layer_streamer.llm.kernels.fused import plain_rms_norm
from layer_streamer.llm.models.rope import plain_rotate

pytestmark = pytest.mark.skipif(library() is None, reason="nothing is compiled here")

TOLERANCE = 2e-6
"""Relative to the largest number there is."""
WIDTHS = st.integers(1, 5).map(lambda sixteens: 16 * sixteens)
KINDS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def close(found: torch.Tensor, expected: torch.Tensor, times: float = 1.0) -> bool:
    most = expected.abs().max().clamp_min(1e-30)
    return bool((found.double() - expected).abs().max() <= times * TOLERANCE * most)


@given(rows=st.integers(1, 9), width=WIDTHS, added=st.booleans(), power=st.integers(-8, 8))
def test_a_norm_is_that_of_torch(rows: int, width: int, added: bool, power: int) -> None:
    torch.manual_seed(rows * width)
    x, more = torch.randn(2, rows, width) * 2.0**power
    weight = torch.rand(width)
    found = kernels.rms_norm(x, more if added else None, weight, 1e-6)
    assert found is not None
    total = x + more if added else x
    assert torch.equal(found[0], total)
    assert close(found[1], plain_rms_norm(total.double(), weight.double(), 1e-6))


@given(
    heads=st.integers(1, 5), tokens=st.integers(1, 6), half=st.integers(1, 40),
    interleaved=st.booleans(),
)  # fmt: skip
def test_heads_are_turned_to_the_bit_as_torch_turns_them(
    heads: int, tokens: int, half: int, interleaved: bool
) -> None:
    torch.manual_seed(heads)
    x_HTE = torch.randn(tokens, heads, 2 * half).transpose(0, 1)
    table = torch.randn(2, tokens, half)
    found = kernels.rotate(x_HTE, table, interleaved=interleaved)
    assert found is not None
    assert torch.equal(found, plain_rotate(x_HTE, table, interleaved=interleaved))


@given(st.lists(st.floats(-200, 200, width=32), min_size=16, max_size=16))
def test_a_gate_is_that_of_torch_and_infinity_and_no_number_stay_so(gates: list[float]) -> None:
    gate, up = (
        torch.tensor([[*gates, *[math.inf, -math.inf, math.nan, 0.0] * 4]]),
        torch.ones(1, 32),
    )
    expected = F.silu(gate.double())
    found = kernels.gated(gate.clone(), up)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-36, equal_nan=True)


def looked_at(
    q: torch.Tensor, memory: torch.Tensor, places: list[int], scale: float, window: int | None
) -> torch.Tensor:
    """By torch, in float64."""
    groups, (heads, tokens, _) = memory.shape[2], q.shape
    keys, values = memory[places].double().permute(1, 2, 0, 3)
    share = heads // groups
    keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
    scores = q.double() @ keys.transpose(1, 2) * scale
    count = len(places)
    last = torch.arange(count - tokens, count)[:, None]
    back = last - torch.arange(count)
    scores[:, (back < 0) | (back >= (window or count + 1))] = -math.inf
    return scores.softmax(-1) @ values


@settings(max_examples=60)
@given(data=st.data(), kind=KINDS, width=WIDTHS, groups=st.integers(1, 3), share=st.integers(1, 4))
def test_a_look_back_is_that_of_torch_wherever_positions_lie(
    data: st.DataObject, kind: torch.dtype, width: int, groups: int, share: int
) -> None:
    tokens = data.draw(st.integers(1, kernels.FEW_TOKENS))
    runs, place = [], 0
    for count in data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3)):
        place += data.draw(st.integers(0, 3))
        runs.append((place, count))
        place += count
    data.draw(st.randoms()).shuffle(runs)
    places = [place + i for place, count in runs for i in range(count)]
    tokens = min(tokens, len(places))
    window = data.draw(st.none() | st.integers(1, len(places)))
    torch.manual_seed(len(places))
    memory = torch.randn(place + 2, 2, groups, width).to(kind)
    memory[[i for i in range(len(memory)) if i not in places]] = math.nan  # nobody's
    q = torch.randn(tokens, groups * share, width).transpose(0, 1) * data.draw(st.floats(0.1, 9))
    options = {"scale": width**-0.5, "window": window}
    assert kernels.looks(q, memory)
    found = kernels.look_back(q, memory, runs, **options)
    # A score's last place is as far off as the score is large, and so is what comes of it.
    largest = 1 + float(q.norm(dim=-1).max() * memory[places, 0].float().norm(dim=-1).max())
    assert close(found, looked_at(q, memory, places, **options), 1 + largest * width**-0.5 / 8)


def test_what_a_token_sees_depends_to_the_bit_on_neither_threads_nor_others_of_its_pass() -> None:
    torch.manual_seed(0)
    memory = torch.randn(700, 2, 2, 64).bfloat16()
    q, found = torch.randn(4, 8, 64), []
    before = torch.get_num_threads()
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        found.append(kernels.look_back(q, memory, [(0, 700)], scale=0.1, window=None))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for token in range(8):
        runs, alone = [(0, 693 + token)], q[:, token : token + 1].contiguous()
        seen = kernels.look_back(alone, memory, runs, scale=0.1, window=None)
        assert torch.equal(seen, found[0][:, token : token + 1])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("part", [0, 1])
def test_keys_and_values_that_are_no_numbers_are_not_hidden(value: float, part: int) -> None:
    memory, q = torch.randn(300, 2, 1, 16), torch.ones(1, 1, 16)
    memory[200, part, 0, 3] = value
    found = kernels.look_back(q, memory, [(0, 300)], scale=1.0, window=None)
    # Of a key that is -inf, the score alone: nobody looks there.
    assert bool(torch.isfinite(found).all()) == (part == 0 and value == -math.inf)
    assert torch.isfinite(kernels.look_back(q, memory, [(0, 200)], scale=1.0, window=None)).all()


def test_more_numbers_other_dtypes_and_widths_are_left_to_torch() -> None:
    x, weight = torch.randn(2, 32), torch.ones(32)
    assert kernels.rms_norm(x.bfloat16(), None, weight, 1e-6) is None
    assert kernels.rms_norm(x[:, :24].contiguous(), None, weight[:24], 1e-6) is None
    assert kernels.rms_norm(torch.zeros(kernels.FEW, 16), None, weight[:16], 1e-6) is None
    assert kernels.gated(x.t(), x.t()) is None
    assert not kernels.looks(torch.randn(1, 9, 16), torch.randn(9, 2, 1, 16))
    assert not kernels.looks(torch.randn(1, 1, 24), torch.randn(9, 2, 1, 24))
