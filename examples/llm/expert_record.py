"""Which experts passes ask for, put on record: for ``layer-streamer experts``."""

from __future__ import annotations

from pathlib import Path

from layer_streamer import ExpertPass, LayerStreamer, TraceHeader, TraceWriter

from .models.config import ModelConfig


class ExpertRecord:
    """A trace that passes are appended to (docs/moe.md). Thread rules: the thread of the passes."""

    def __init__(self, path: Path, config: ModelConfig, streamer: LayerStreamer) -> None:
        """ValueError where experts do not come on demand; errors of ``TraceWriter``."""
        plan = streamer.plan
        if config.experts is None or not plan.expert_slots:
            raise ValueError(
                "only experts that are brought on demand (experts='demand') go on record"
            )
        self._streamer = streamer
        self._writer = TraceWriter(
            path,
            TraceHeader(
                num_layers=config.num_layers,
                num_experts=config.experts.count,
                top_k=config.experts.per_token,
                expert_nbytes=plan.expert_bytes // plan.expert_slots,
            ),
        )

    def hear(self, tokens: int) -> None:
        """A pass over so many tokens has ended."""
        report = self._streamer.last_experts
        if report is not None and report.needed:
            self._writer.append(ExpertPass(tokens, report.needed))

    def close(self) -> None:
        """Let others write there. Idempotent."""
        self._writer.close()
