"""What a run of fine-tuning is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_LENGTH = 2048
"""Tokens of a row, if nobody says how many and the model's context has as many."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Numbers that a run depends on. ValueError, naming the option, for one that makes no sense."""

    rank: int = 16
    alpha: float | None = None
    """What products of adapters are multiplied by, times the rank; None: twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Names of modules that get an adapter, or their ends; none: all linear ones of blocks."""
    epochs: float = 3.0
    steps: int | None = None
    """In place of epochs."""
    learning_rate: float = 2e-4
    batch: int = 1
    """Rows that a pass over the model is for."""
    accumulation: int = 8
    """Passes that a step of the optimizer is for."""
    eval_steps: int | None = None
    """Steps between looks at what is held out; None: one an epoch."""
    save_steps: int = 50
    """Steps between checkpoints that a run which was ended goes on from."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank == 0:
            raise ValueError(
                "--rank 0: full fine-tuning is refused: the weights of the model stream, so they "
                "are read and never written; what is trained is an adapter of at least rank 1"
            )
        for name in ("rank", "steps", "batch", "accumulation", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_option(name)} {value}: must be at least 1")
        for name in ("alpha", "epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{_option(name)} {value}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: must be from 0 to below 1")

    @property
    def scaled_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def record(self) -> dict[str, Any]:
        """All of it, as JSON keeps it."""
        return {**asdict(self), "targets": list(self.targets)}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
