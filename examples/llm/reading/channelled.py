"""Grammars of calls as gpt-oss writes them: a message to a tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..constraints.schema import MOST_NBYTES
from .harmony import FUNCTIONS
from .heads import CALL, CHANNEL, CONSTRAIN, MESSAGE
from .tagged import as_json

TO = f"to={FUNCTIONS}"
"""Behind this a call has begun."""
CHANNEL_MARKS = {"channel": CHANNEL, "constrain": CONSTRAIN, "message": MESSAGE, "call": CALL}
"""By the names of their rules."""
SPACES = {"item_separator": ", ?", "key_separator": ": ?"}
"""As models have learned JSON here: with a space or without."""


def channelled_calls(tools: Sequence[Mapping[str, Any]]) -> str:
    """A grammar of what follows ``to=functions.`` in a message to one of the tools, up to the end
    of it. ValueError for what is beyond a bound."""
    between = '(channel "commentary")? ((" "? constrain " "? | " ") "json")?'
    return f"start: {_calls(tools, between)}"


def whole_channelled_calls(tools: Sequence[Mapping[str, Any]]) -> str:
    """Likewise, from the beginning of a text on that is nothing else."""
    calls = _calls(tools, '" " constrain "json"')
    return f"start: channel {json.dumps(f'commentary {TO}')} {calls}"


def _calls(tools: Sequence[Mapping[str, Any]], between: str) -> str:
    found = " | ".join(_call(tool["function"], between) for tool in tools)
    if len(found) > MOST_NBYTES:
        raise ValueError(f"tools: {len(found):,} characters, the most are {MOST_NBYTES:,}")
    return f"({found})"


def _call(function: Mapping[str, Any], between: str) -> str:
    parameters = function.get("parameters") or {"type": "object"}
    return (
        f"({json.dumps(function['name'])} {between} message {as_json(parameters, **SPACES)} call)"
    )
