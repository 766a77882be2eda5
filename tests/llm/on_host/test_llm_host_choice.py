"""The choice between computing layers in host memory and streaming them, by what passes took."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.on_host.choice import FEW, MOST_TOKENS, WORST, Choice

Seconds = Callable[[int], float]


def spend(choice: Choice, tokens: int, passes: int, there: Seconds, streamed: Seconds) -> float:
    """Seconds of so many passes, of which each that followed one of its kind is heard of."""
    total, before = 0.0, None
    for _ in range(passes):
        here = choice.there(tokens)
        seconds = there(tokens) if here else streamed(tokens)
        total += seconds
        if here == before and choice.wants(tokens, there=here):
            choice.hear(tokens, seconds, there=here)
            if here:
                choice.hear_link(streamed(1))
        before = here
    return total


@given(
    tokens=st.integers(1, MOST_TOKENS),
    each=st.floats(0.0, 0.3),
    plain=st.floats(0.01, 2.0),
    link=st.floats(0.1, 1.0),
)
def test_many_passes_of_a_kind_take_at_most_a_twentieth_more_than_the_better_way(
    tokens: int, each: float, plain: float, link: float
) -> None:
    def there(count: int) -> float:
        return plain + each * count

    choice = Choice()
    for size in range(tokens.bit_length()):  # until it is known
        spend(choice, 1 << size, 20, there, lambda count: link)
    spend(choice, tokens, 20, there, lambda count: link)
    taken = spend(choice, tokens, 640, there, lambda count: link)
    assert taken <= 1.05 * 640 * min(there(tokens), link)


def test_before_anything_is_known_few_tokens_are_computed_where_layers_lie() -> None:
    assert Choice().there(1) and Choice().there(FEW) and not Choice().there(FEW + 1)


def test_no_more_tokens_than_kernels_take_are_computed_there_however_fast_it_is() -> None:
    choice = Choice()
    choice.hear(1, 1e-9, there=True)
    choice.hear_link(1.0)
    assert choice.there(MOST_TOKENS) and not choice.there(MOST_TOKENS + 1)


@pytest.mark.parametrize("tokens", [2, 8, 64])
def test_more_tokens_are_tried_if_that_cannot_take_much_longer(tokens: int) -> None:
    choice = Choice()
    choice.hear(1, 0.1, there=True)
    choice.hear_link(1.0)
    assert choice.there(tokens) == (0.1 * tokens <= WORST)


def test_a_machine_that_changes_is_noticed() -> None:
    choice = Choice()
    spend(choice, 1, 50, lambda count: 0.5, lambda count: 0.6)
    assert choice.there(1)
    spend(choice, 1, 1000, lambda count: 1.0, lambda count: 0.6)
    assert not choice.there(1)
