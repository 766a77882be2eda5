"""What is counted, for Prometheus: in a registry of this server's own."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .working.pieces import Piece
from .working.served import Facts, Load

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
"""Of a pass: as long as the model takes to move."""
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


class Metrics:
    """Thread rules: any thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"layer_streamer_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"layer_streamer_{name}", text, labels, registry=registry)

        self._pass_seconds = Histogram(
            "layer_streamer_pass_seconds", "Of a pass.", buckets=SECONDS, registry=registry
        )
        self._pass_tokens = Histogram(
            "layer_streamer_pass_tokens", "New tokens a pass.", buckets=TOKENS, registry=registry
        )
        self._tokens = counter("tokens", "Of texts that have ended.", "kind")
        self._drafted = counter("drafted_tokens", "Of drafts.", "outcome")
        self._texts = counter("texts", "That have ended.", "reason")
        self._replies = counter("replies", "By HTTP status.", "status")
        self._rows = gauge("rows", "Texts that take part in passes.")
        self._waiting = gauge("waiting", "Texts that wait for a row.")
        self._kv_used = gauge("kv_tokens_used", "Tokens whose keys and values are held.")
        self._kv = gauge("kv_tokens", "Tokens whose keys and values there is room for.")
        self._share = gauge("share_of_limit", "Of the last pass, by what the machine could give.")
        self._bytes = gauge("model_bytes", "Of the model's layers, by tier.", "tier")
        self._experts = gauge("experts", "Asked for by the last pass, by where they were.", "from")
        self._expert_bytes = gauge("expert_bytes", "Of experts that the last pass had brought.")
        self._share.set(math.nan)  # not known
        for reason in ("stop", "length", "error", "cancelled"):
            self._texts.labels(reason)

    def hear_facts(self, facts: Facts) -> None:
        """An engine has been opened."""
        self._kv.set(facts.places)
        for tier, size in facts.where.items():
            self._bytes.labels(tier).set(size)

    def hear_pass(self, seconds: float, tokens: int) -> None:
        """A pass took so long and gave so many tokens."""
        self._pass_seconds.observe(seconds)
        self._pass_tokens.observe(tokens)

    def hear_load(self, load: Load) -> None:
        """What the engine is doing."""
        self._rows.set(load.rows)
        self._waiting.set(load.waiting)
        self._kv_used.set(load.places_used)
        if load.share_of_limit is not None:
            self._share.set(load.share_of_limit)
        for where in ("device", "brought") if load.experts else ():
            self._experts.labels(where).set(load.experts[where])
            self._expert_bytes.set(load.experts["bytes"])

    def hear_end(self, piece: Piece) -> None:
        """A text has ended."""
        self._texts.labels(piece.finish_reason or "error").inc()
        if (account := piece.account) is not None:
            self._tokens.labels("prompt").inc(account.prompt_tokens - account.cached_tokens)
            self._tokens.labels("cached").inc(account.cached_tokens)
            self._tokens.labels("new").inc(account.new_tokens)
            self._drafted.labels("agreed").inc(account.agreed)
            self._drafted.labels("other").inc(account.drafted - account.agreed)

    def hear_cancel(self, texts: int) -> None:
        """Nobody wanted them any more."""
        self._texts.labels("cancelled").inc(texts)

    def hear_reply(self, status: int) -> None:
        """A request was answered."""
        self._replies.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
