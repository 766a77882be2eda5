"""The error that says no to a model."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not one that this engine can compute."""
