"""What is tried on a few examples, or cases, by default, and on many in slow tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy


def tried(
    few: int, many: int, **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of what these draw; its other parameters are fixtures, the same for all examples."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(examples: int, **fixtures: Any) -> None:
            @wraps(test)
            def once(**drawn: Any) -> None:
                test(**fixtures, **drawn)

            # What hypothesis goes by is the test, not what stands around it.
            once.__signature__ = own  # type: ignore[attr-defined]
            settings(max_examples=examples)(given(**strategies)(once))()

        parameters = inspect.signature(test).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        drawn = [one.replace(kind=keyword) for one in parameters if one.name in strategies]
        assert len(drawn) == len(strategies), "of each there is a parameter"
        own = inspect.Signature(drawn)
        kept = [one for one in parameters if one.name not in strategies]
        count = inspect.Parameter("examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        wrapped: Any = wraps(test)(run)
        del wrapped.__wrapped__
        wrapped.__signature__ = inspect.Signature([count, *kept])
        counts = [few, pytest.param(many, marks=pytest.mark.slow)]
        found: Callable[..., None] = pytest.mark.parametrize("examples", counts)(wrapped)
        return found

    return decorate


def slow_but(kept: str, cases: Iterable[str]) -> list[Any]:
    """The cases of a parametrized test, all slow but the one that stands for them."""
    return [one if one == kept else pytest.param(one, marks=pytest.mark.slow) for one in cases]
