"""Random damage to a record of JSON: any value in any place, bytes, what is cut off."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 10**9, 10**400, float("nan"), float("inf"), -float("inf"), 1e-320, 1e308]
PLAIN = [None, True, False, "", "x", "\ud800", "\x00", *NUMBERS, [], {}, [[1]], {"a": []}]
ANY = st.sampled_from(PLAIN) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def places(document: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every value in a document, the document itself first."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    if isinstance(document, list):
        items = enumerate(document)
    return [before, *(way for key, value in items for way in places(value, (*before, key)))]


def put(document: Any, way: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at the end of a way."""
    if not way:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return changed


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> bytes:
    """The document's text after damage of some kind, as bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "cut", "bytes", "deep", "removed"]))
    text = json.dumps(document).encode()
    way = draw(st.sampled_from(places(document)[1:]))
    if kind == "value":
        return json.dumps(put(document, way, draw(ANY))).encode()
    if kind == "removed":
        return json.dumps(put(document, way[:-1], {})).encode()
    if kind == "deep":
        return (
            json.dumps(put(document, way, "HERE"))
            .encode()
            .replace(
                b'"HERE"', draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000]))
            )
        )
    at = draw(st.integers(0, len(text) - 1))
    if kind == "cut":
        return text[:at]
    return text[:at] + draw(st.binary(min_size=1, max_size=8)) + text[at + 1 :]
