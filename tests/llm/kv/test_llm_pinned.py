"""Host memory that grows: what is taken, and where copies are cut."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.kv.int8 import Int8Rows, round_to_int8
from layer_streamer.llm.kv.pinned import GrowingMemory

PAGE = 4096
CPU = torch.device("cpu")


def reach(memory: GrowingMemory, start: int, end: int) -> None:
    memory.reach(np.array([[start, end - start]]))


def test_nothing_is_taken_before_it_is_reached_and_nothing_twice():
    memory = GrowingMemory(100 * PAGE, 2 * PAGE, CPU)
    assert memory.nbytes == 0
    reach(memory, PAGE, PAGE + 1)
    assert memory.nbytes == 2 * PAGE
    memory.memory[PAGE] = 7
    reach(memory, 0, 5 * PAGE)
    assert memory.nbytes == 6 * PAGE
    assert memory.memory[PAGE] == 7, "what was there is kept"


def test_more_may_be_promised_than_the_machine_has():
    memory = GrowingMemory(1 << 44, 1 << 20, CPU)
    reach(memory, (1 << 44) - PAGE, 1 << 44)
    assert memory.nbytes == 1 << 20


reaches = st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), min_size=1, max_size=10)


@given(reaches, st.data())
def test_pieces_cover_the_bytes_in_order_and_cross_no_segment(steps, data):
    memory, taken = GrowingMemory(64 * PAGE, PAGE, CPU), set()
    for first, count in steps:
        reach(memory, first * PAGE, min(first + count, 64) * PAGE)
        taken |= set(range(first, min(first + count, 64)))
    start = data.draw(st.sampled_from(sorted(taken)))
    end = start
    while end in taken:
        end += 1
    middle = (start + end) * PAGE // 2
    runs = [(start * PAGE + 5, middle), (middle, end * PAGE - 3)]
    found = memory.pieces(np.array([(first, last - first) for first, last in runs]))
    pieces = [(first, first + count) for first, count in found.tolist()]
    assert pieces[0][0] == start * PAGE + 5 and pieces[-1][1] == end * PAGE - 3
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(first < last for first, last in pieces)
    for first, last in pieces:
        assert not any(first < border < last for border in memory._borders)


def there_and_back(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (T, 2, G, E), encoded and decoded."""
    codec = Int8Rows(*tokens.shape[2:])
    raw = torch.empty(len(tokens), codec.token_nbytes, dtype=torch.uint8)
    codec.encode(tokens, raw)
    found = torch.empty_like(tokens)
    codec.decode(raw, found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_int8_tokens_come_back_within_half_a_step(scale, dtype):
    torch.manual_seed(0)
    tokens = (torch.randn(9, 2, 3, 16) * scale).to(dtype)
    tokens[2] = 0
    found = there_and_back(tokens)
    step = tokens.float().abs().amax(-1, keepdim=True) / 127
    off = (found.float() - tokens.float()).abs()
    own = torch.finfo(dtype)  # what the numbers' own dtype rounds away
    assert (
        off <= 0.51 * step + own.eps * tokens.float().abs() + own.smallest_normal * own.eps
    ).all()
    assert torch.equal(found[2], tokens[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 1 << 30), scale=st.floats(-60, 40))
def test_rounding_to_int8_is_coding_there_and_back_and_coding_changes_nothing_more(
    dtype, seed, scale
):
    draw = torch.Generator().manual_seed(seed)
    most = torch.finfo(dtype).max
    tokens = (torch.randn(64, 2, 3, 8, generator=draw) * 2.0**scale).clamp(-most, most).to(dtype)
    rounded = round_to_int8(tokens)
    assert torch.equal(rounded, there_and_back(tokens))
    assert torch.equal(there_and_back(rounded), rounded)
    assert torch.equal(round_to_int8(rounded), rounded)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_head_of_which_a_number_is_not_finite_comes_back_as_nan(bad):
    tokens = torch.ones(3, 2, 2, 4)
    tokens[1, 0, 1, 2] = bad
    for found in (there_and_back(tokens), round_to_int8(tokens)):
        assert found[1, 0, 1].isnan().all()
        found[1, 0, 1] = 1
        assert torch.allclose(found, torch.ones(3, 2, 2, 4), rtol=1e-3)


@pytest.mark.gpu
def test_memory_that_is_reached_is_page_locked_piece_by_piece():
    memory = GrowingMemory(64 * PAGE, PAGE, torch.device("cuda"))
    reach(memory, 0, 3 * PAGE)
    reach(memory, 3 * PAGE, 5 * PAGE)
    assert not memory.refused and memory.memory[: 5 * PAGE].is_pinned()
    pieces = memory.pieces(np.array([[0, 5 * PAGE]]))
    assert pieces.tolist() == [[0, 3 * PAGE], [3 * PAGE, 2 * PAGE]]
    memory.close()
    assert not memory.memory[:PAGE].is_pinned()
