"""A GGUF file's metadata, below the name of its architecture."""

from __future__ import annotations

from typing import Any

from layer_streamer import Manifest

from ..errors import UnsupportedModelError


class GgufKeys:
    """What it says of the model's numbers."""

    def __init__(self, manifest: Manifest) -> None:
        self._metadata, self._path = manifest.metadata, manifest.path
        self.architecture = str(manifest.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """As it is."""
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """UnsupportedModelError if it is none, or less than 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refusal(key, "a single whole number is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """UnsupportedModelError if it is none."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, "a number is needed")
        return float(value)

    def refusal(self, key: str, reason: str) -> UnsupportedModelError:
        """The error of a key."""
        name = f"{self.architecture}.{key}"
        found = "is missing" if self.get(key) is None else f"is {self.get(key)!r}"
        return UnsupportedModelError(f"{self._path}: metadata {name} {found}: {reason}")
