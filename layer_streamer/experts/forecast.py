"""What experts on demand would come to: bytes and tokens a second, by how many are there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.experts import ExpertLayer

HIT_RATES = (0.0, 0.5, 0.8)
"""Of what a token asks for, what is there: published figures lie between 8 and 96 %."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Rate:
    """A token at one rate of hits."""

    hits: float
    missing_bytes: float
    """That are brought."""
    tokens_per_second: float | None
    """If copies, and all else that streams, take all the time; None: a rate is not known, or
    nothing moves."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one row that decodes, a token a pass."""

    per_token: int
    """Experts that a token asks each layer for."""
    token_bytes: int
    """Of all experts that it asks for."""
    slots: int
    slots_a_layer: float
    more_slots: int
    """For one GiB more."""
    rates: tuple[Rate, ...]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"experts: {self.slots:,} slots, {self.slots_a_layer:.1f} a layer; one GiB more is "
            f"{self.more_slots:,}",
            f"a token asks {self.per_token} of each layer: {self.token_bytes / 1e9:.3f} GB",
        ]
        for rate in self.rates:
            line = f"  hits {rate.hits:4.0%}: {rate.missing_bytes / 1e9:.3f} GB a token"
            if rate.tokens_per_second is not None:
                line += f", {rate.tokens_per_second:.1f} tokens a second at most"
            lines.append(line)
        return "\n".join(lines)


def forecast(
    layers: Sequence[ExpertLayer],
    per_token: int,
    slots: tuple[int, int],
    seconds: float | None,
    copy_rate: float | None,
) -> Forecast:
    """``slots``: how many there are, and their bytes; ``seconds``: of a pass without experts, if
    that is known; ``copy_rate``: bytes a second to the device."""
    count, nbytes = slots
    token = sum(min(per_token, layer.num_experts) * layer.expert_nbytes for layer in layers)

    def rate(hits: float) -> Rate:
        missing = token * (1 - hits)
        if seconds is None or not copy_rate:
            return Rate(hits, missing, None)
        whole = seconds + missing / copy_rate
        return Rate(hits, missing, 1 / whole if whole else None)

    more = GIB * count // nbytes
    return Forecast(per_token, token, count, count / len(layers), more, tuple(map(rate, HIT_RATES)))


def experts_per_token(fields: Mapping[str, Any]) -> int | None:
    """What a config.json, or a GGUF file's metadata, says of it; None if it does not."""
    arch = fields.get("general.architecture")
    text = fields.get("text_config")
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
    found = fields.get(f"{arch}.expert_used_count") if arch else None
    for name in names if found is None else ():
        found = fields.get(name)
        if found is None and isinstance(text, Mapping):
            found = text.get(name)
        if found is not None:
            break
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
