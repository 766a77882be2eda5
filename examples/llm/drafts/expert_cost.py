"""What a pass of more tokens takes longer because it asks for more experts."""

from __future__ import annotations

from collections.abc import Callable

from layer_streamer import ExpertReport, LayerStreamer, Plan

from ..models.config import ModelConfig

NEWEST = 1 / 8
"""How much of what is known of passes the last one counts."""


class ExpertCost:
    """Seconds in which experts come that are brought on demand, by the tokens of a pass.

    Tokens that know nothing of each other ask ``count`` experts of a layer for
    count * (1 - (1 - per_token / count) ** tokens) different ones. Which part of those had to be
    brought lately is measured, and with it how much alike tokens choose. Thread rules: one thread.
    """

    def __init__(
        self,
        experts: tuple[int, int],
        nbytes: float,
        seconds_a_byte: float,
        report: Callable[[], ExpertReport | None],
    ) -> None:
        """``experts``: of a layer, and of these for each token; ``nbytes``: of one; ``report``: of
        the last pass."""
        self._count, self._per_token = experts
        self._nbytes, self._seconds_a_byte, self._report = nbytes, seconds_a_byte, report
        self._layers = 0
        self._share: float | None = None

    def hear(self, tokens: int) -> float:
        """A pass of so many tokens has ended: the seconds in which its experts came."""
        report = self._report()
        if report is None or not report.needed:
            return 0.0
        self._layers = len(report.needed)
        share = report.copied_bytes / self._bytes(tokens)
        known = share if self._share is None else self._share
        self._share = known + (share - known) * NEWEST
        return report.copied_bytes * self._seconds_a_byte

    def seconds(self, tokens: int) -> float:
        """Likewise, of a pass that is yet to come; 0 before the first."""
        return (self._share or 0.0) * self._bytes(tokens) * self._seconds_a_byte

    def _bytes(self, tokens: int) -> float:
        """Of the experts that so many tokens are expected to ask for."""
        left = 1 - min(self._per_token / self._count, 1.0)
        return self._layers * self._count * (1 - left**tokens) * self._nbytes


def cost_of(streamer: LayerStreamer, config: ModelConfig) -> ExpertCost | None:
    """None where no experts are brought on demand, or it is not known how fast they come."""
    plan = streamer.plan
    each = _seconds_a_byte(plan)
    if config.experts is None or not plan.expert_slots or each is None:
        return None
    return ExpertCost(
        (config.experts.count, config.experts.per_token),
        plan.expert_bytes / plan.expert_slots,
        each,
        lambda: streamer.last_experts,
    )


def _seconds_a_byte(plan: Plan) -> float | None:
    """By the rates that were measured of this machine; None if one that counts was not."""
    tiers = plan.expert_tiers
    if tiers is None:
        return None
    read = plan.machine.rates.read if tiers.read_mode == "direct" else None
    seconds = 0.0
    for nbytes, rate in ((tiers.page_bytes, plan.limits.get("copy")), (tiers.disk_bytes, read)):
        if nbytes and not rate:
            return None
        seconds += nbytes / rate if rate else 0.0
    return seconds / (tiers.page_bytes + tiers.disk_bytes)
