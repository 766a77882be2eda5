from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One of scripted texts, for all tests of a file."""
    with serving() as running:
        yield running
