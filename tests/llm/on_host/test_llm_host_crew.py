"""How many threads compute layers in host memory, by what passes took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.on_host.crew import AGAIN, TRIES, Crew


def spend(crew: Crew, seconds: list[float], passes: int, *, slow: int = 0) -> list[int]:
    """The numbers of so many passes, which take ``seconds`` by the number; every ``slow``-th takes
    ten times as long."""
    numbers = []
    for turn in range(passes):
        numbers.append(crew.number)
        crew.count()
        if crew.tries:
            once = 10.0 if slow and turn % slow == 0 else 1.0
            crew.hear(numbers[-1], once * seconds[numbers[-1]])
    return numbers


@given(
    most=st.integers(1, 256),
    seconds=st.lists(st.floats(0.01, 9.0), min_size=257, max_size=257),
    slow=st.sampled_from([0, 2, 3, 5]),
)
def test_the_number_is_kept_with_which_passes_took_least_whatever_made_some_of_them_slow(
    most: int, seconds: list[float], slow: int
) -> None:
    crew = Crew(most)
    tried = set(spend(crew, seconds, 64, slow=slow))
    assert max(tried) == most and min(tried) >= 1
    assert not crew.tries
    assert seconds[crew.number] == min(seconds[number] for number in tried)


def test_a_machine_on_which_others_begin_to_compute_is_noticed() -> None:
    crew, alone, beside = (
        Crew(16),
        [0.0, *(1 / n for n in range(1, 17))],
        [float(n) for n in range(17)],
    )
    assert spend(crew, alone, 64)[-1] == 16
    assert spend(crew, beside, AGAIN + 64)[-1] == 6


def test_where_there_is_one_thread_nothing_is_tried() -> None:
    assert not Crew(1).tries and Crew(1).number == 1
    assert len(set(spend(Crew(4), [1.0] * 5, 4 * TRIES))) == 3
