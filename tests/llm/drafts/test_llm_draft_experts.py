"""What drafts cost where each token of a pass asks for experts of its own."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from mixtures import alone, opened

from layer_streamer import ExpertReport
from layer_streamer.llm.drafts.expert_cost import ExpertCost, _seconds_a_byte
from layer_streamer.llm.drafts.pace import Pace
from layer_streamer.llm.drafts.worth import LENGTHS, Worth

LAYERS, COUNT, PER_TOKEN, NBYTES, RATE = 12, 64, 6, 2.5e6, 20e9
PLAIN = 0.004
"""Seconds of a pass but for its experts."""


class Machine:
    """Passes over a mixture whose tokens choose by themselves, of which a part misses."""

    def __init__(self, misses: float) -> None:
        self._dice, self._misses = random.Random(5), misses
        self.report: ExpertReport | None = None

    def run(self, tokens: int) -> float:
        """Seconds of a pass, which leaves its report."""
        needed, missed = [], 0
        for layer in range(LAYERS):
            chosen = {e for _ in range(tokens) for e in self._dice.sample(range(COUNT), PER_TOKEN)}
            needed.append((layer, tuple(chosen)))
            missed += sum(self._dice.random() < self._misses for _ in chosen)
        asked = sum(len(chosen) for _, chosen in needed)
        nbytes = int(missed * NBYTES)
        self.report = ExpertReport(asked, asked - missed, nbytes, needed=tuple(needed))
        return PLAIN + nbytes / RATE

    def mean(self, tokens: int) -> float:
        return sum(self.run(tokens) for _ in range(40)) / 40


def pace_on(machine: Machine, passes: int = 60) -> Pace:
    """What passes of one token tell."""
    cost = ExpertCost((COUNT, PER_TOKEN), NBYTES, 1 / RATE, lambda: machine.report)
    pace = Pace(cost)
    for _ in range(passes):
        pace.hear(1, machine.run(1))
    return pace


@pytest.mark.parametrize("misses", [0.0, 0.3, 1.0])
def test_passes_of_one_token_tell_what_those_of_more_will_take(misses: float) -> None:
    machine = Machine(misses)
    pace = pace_on(machine)
    for tokens in (1, 2, 5, 9, 17):
        assert pace.seconds(tokens) == pytest.approx(machine.mean(tokens), rel=0.15)


@pytest.mark.parametrize("right", [1, 3, 8])
def test_drafts_are_no_longer_than_their_experts_are_worth(right: int) -> None:
    machine = Machine(0.6)
    plain, counted = Pace(), pace_on(machine)
    plain.hear(1, machine.mean(1))
    lengths, rates = [], dict[int, float]()
    for pace in (plain, counted):
        worth = Worth(pace)
        for _ in range(200):
            worth.hear(right + 1, right, 0.0, 1)
        lengths.append(worth.length(64, 1))
        likely = worth.likelihood
        for tokens in (0, *LENGTHS):
            gained = sum(likely**i for i in range(1, tokens + 1))
            rates[tokens] = (1 + gained) / machine.mean(1 + tokens)
    assert lengths[0] == 64, "which takes all experts of all layers"
    assert lengths[1] < 64 and rates[lengths[1]] > 0.93 * max(rates.values())


def test_what_has_been_measured_of_many_tokens_counts_before_what_follows_from_one() -> None:
    machine = Machine(0.5)
    pace = pace_on(machine)
    for _ in range(60):
        pace.hear(8, machine.run(8) + 0.05)
    assert pace.seconds(8) == pytest.approx(machine.mean(8) + 0.05, rel=0.15)


def test_without_a_report_a_pace_is_what_it_was() -> None:
    cost = ExpertCost((COUNT, PER_TOKEN), NBYTES, 1 / RATE, lambda: None)
    pace, known = Pace(cost), Pace()
    for tokens, seconds in ((1, 0.2), (4, 0.5), (2, 0.3)):
        pace.hear(tokens, seconds)
        known.hear(tokens, seconds)
        assert [pace.seconds(n) for n in range(1, 9)] == [known.seconds(n) for n in range(1, 9)]


def test_seconds_a_byte_are_those_of_the_tiers_that_experts_come_from(tmp_path: Path) -> None:
    alone(tmp_path)
    with opened(tmp_path, "mapped", 5) as streamer:
        plan = streamer.plan
    tiers, machine = plan.expert_tiers, plan.machine
    assert tiers is not None
    known = replace(machine.rates, read=2e9, copy=(20e9,), copy_together=None)
    plan = replace(plan, rates=known, machine=replace(machine, rates=known))
    assert _seconds_a_byte(plan) == pytest.approx(1 / 20e9)
    half = replace(tiers, disk_bytes=tiers.page_bytes, read_mode="direct")
    assert _seconds_a_byte(replace(plan, expert_tiers=half)) == pytest.approx(5.5 / 20e9)
    half = replace(half, read_mode="buffered")
    assert _seconds_a_byte(replace(plan, expert_tiers=half)) is None
    assert _seconds_a_byte(replace(plan, expert_tiers=None)) is None
