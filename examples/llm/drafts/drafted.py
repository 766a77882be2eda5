"""What has come of drafts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Drafted:
    """Of the drafts of one source, for one row."""

    drafts: int = 0
    tokens: int = 0
    """Of all of them."""
    depths: list[int] = field(default_factory=list)
    """How many of the drafts had at least one token that is the text's, at least two, and so on."""

    @property
    def agreed(self) -> int:
        """Tokens that are the text's."""
        return sum(self.depths)

    def add(self, tokens: int, agreed: int) -> None:
        """One more draft, of which so many tokens are the text's."""
        self.drafts += 1
        self.tokens += tokens
        self.depths += [0] * (agreed - len(self.depths))
        for i in range(agreed):
            self.depths[i] += 1

    def __str__(self) -> str:
        return f"{self.agreed} of {self.tokens}"
