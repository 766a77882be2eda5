"""Dataclasses out of parsed JSON, whatever that holds: what fits, or a ValueError."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

HUGE = 1 << 62
"""No number of a record is larger."""
MOST_SAID = 40
"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True, slots=True)
class Form:
    """What records of one kind may hold beside what their types say."""

    accepts: Callable[[str, Any], bool] = lambda name, value: True
    """By a field's name, whether it can have this number (of its field's type) or text."""
    exact: bool = True
    """False: fields that are not known are left out, and what is missing has its default."""

    def read(self, kind: Any, value: Any, name: str) -> Any:  # noqa: PLR0911 - one a kind
        """``value`` as ``kind``: a dataclass, tuple, Mapping, Literal or union of what JSON has.
        ValueError unless it fits."""
        origin, inner = get_origin(kind), get_args(kind)
        if is_dataclass(kind):
            return self._read_fields(kind, value, name)
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(self.read(inner[0], item, name) for item in value)
        if origin is Mapping and isinstance(value, dict):
            return {key: self.read(inner[1], item, name) for key, item in value.items()}
        if origin is Literal and isinstance(value, str) and value in inner:
            return value
        if origin is types.UnionType:
            if value is None and types.NoneType in inner:
                return None
            # Of several that are not None, all are plain.
            kind = next((one for one in inner if _is_plain(one, value)), inner[0])
            return self.read(kind, value, name)
        if _is_plain(kind, value):
            plain = float(value) if kind is float else value
            if self.accepts(name, plain):
                return plain
        called = getattr(kind, "__name__", kind)
        raise ValueError(f"{name}={_said(value)}: not a {called} that a record can have")

    def _read_fields(self, kind: Any, value: Any, name: str) -> Any:
        wanted = {field.name for field in fields(kind)}
        if not isinstance(value, dict) or (self.exact and set(value) != wanted):
            raise ValueError(f"{name}: does not have exactly the fields {sorted(wanted)}")
        hints = get_type_hints(kind)
        given = {key: self.read(hints[key], value[key], key) for key in value if key in wanted}
        try:
            return kind(**given)
        except TypeError as error:  # one without a default is missing
            raise ValueError(f"{name}: {error}") from error


def _is_plain(kind: Any, value: Any) -> bool:
    """True for a bool, a text, or a number within bounds that is a ``kind``."""
    if kind is float and type(value) in (int, float):
        return -HUGE <= value <= HUGE and math.isfinite(value)
    if kind is int and type(value) is int:
        return -HUGE <= value <= HUGE
    return kind in (bool, str) and type(value) is kind


def _said(value: Any) -> str:
    if isinstance(value, int) and not -HUGE <= value <= HUGE:
        return "a number of many digits"
    return repr(value)[:MOST_SAID]
