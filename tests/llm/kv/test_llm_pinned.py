"""Host memory that grows: what is taken, and where copies are cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.kv.int8 import Int8Rows
from layer_streamer.llm.kv.pinned import GrowingMemory

PAGE = 4096
CPU = torch.device("cpu")


def test_nothing_is_taken_before_it_is_reached_and_nothing_twice():
    memory = GrowingMemory(100 * PAGE, 2 * PAGE, CPU)
    assert memory.nbytes == 0
    memory.reach(PAGE, PAGE + 1)
    assert memory.nbytes == 2 * PAGE
    memory.memory[PAGE] = 7
    memory.reach(0, 5 * PAGE)
    assert memory.nbytes == 6 * PAGE
    assert memory.memory[PAGE] == 7, "what was there is kept"


def test_more_may_be_promised_than_the_machine_has():
    memory = GrowingMemory(1 << 44, 1 << 20, CPU)
    memory.reach((1 << 44) - PAGE, 1 << 44)
    assert memory.nbytes == 1 << 20


reaches = st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), min_size=1, max_size=10)


@given(reaches, st.data())
def test_pieces_cover_the_bytes_in_order_and_cross_no_segment(steps, data):
    memory, taken = GrowingMemory(64 * PAGE, PAGE, CPU), set()
    for first, count in steps:
        memory.reach(first * PAGE, min(first + count, 64) * PAGE)
        taken |= set(range(first, min(first + count, 64)))
    start = data.draw(st.sampled_from(sorted(taken)))
    end = start
    while end in taken:
        end += 1
    pieces = list(memory.pieces(start * PAGE + 5, end * PAGE - 3))
    assert pieces[0][0] == start * PAGE + 5 and pieces[-1][1] == end * PAGE - 3
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    for first, last in pieces:
        assert not any(first < border < last for border in memory._borders)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_int8_tokens_come_back_within_half_a_step(scale):
    torch.manual_seed(0)
    codec = Int8Rows(3, 16)
    tokens = torch.randn(9, 2, 3, 16) * scale
    tokens[2] = 0
    raw = torch.empty(9, codec.token_nbytes, dtype=torch.uint8)
    codec.encode(tokens, raw)
    found = torch.empty_like(tokens)
    codec.decode(raw, found)
    step = tokens.abs().amax(-1, keepdim=True) / 127
    # A float16 scale is off by up to 2**-11 of itself, or by the smallest float16.
    assert ((found - tokens).abs() <= 0.6 * step + 127 * 6e-8).all()
    assert torch.equal(found[2], tokens[2])


@pytest.mark.gpu
def test_memory_that_is_reached_is_page_locked_piece_by_piece():
    memory = GrowingMemory(64 * PAGE, PAGE, torch.device("cuda"))
    memory.reach(0, 3 * PAGE)
    memory.reach(3 * PAGE, 5 * PAGE)
    assert memory.pinned and memory.memory[: 5 * PAGE].is_pinned()
    assert list(memory.pieces(0, 5 * PAGE)) == [(0, 3 * PAGE), (3 * PAGE, 5 * PAGE)]
    memory.close()
    assert not memory.memory[:PAGE].is_pinned()
