"""Messages as gpt-oss's template reads them: reasoning is ``thinking``; each calls once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ...text.messages import text_of

REASONING = ("reasoning_content", "reasoning")
"""Names under which clients send it back."""


def turns_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each call of a message in one of its own, before what came of it.

    A message that calls has no place for text there: what stood before its calls goes with what
    led to them.
    """
    found, at = list[Mapping[str, Any]](), 0
    while at < len(messages):
        message, at = _thinking(messages[at]), at + 1
        calls = message.get("tool_calls")
        if message["role"] != "assistant" or not calls:
            found.append(message)
            continue
        results = list(takewhile(lambda one: one["role"] == "tool", messages[at:]))
        at += len(results)
        before = {"content": "", **_before(message)}
        for call in calls:
            found.append({**message, **before, "tool_calls": [call]})
            known = call.get("id")
            own = [one for one in results if known is not None and one.get("tool_call_id") == known]
            results = [one for one in results if one not in own]
            found += own
            before = {"content": "", "thinking": ""}
        found += results
    return found


def _thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    told = [message[name] for name in REASONING if isinstance(message.get(name), str)]
    found = {name: value for name, value in message.items() if name not in REASONING}
    if told and "thinking" not in message and message["role"] == "assistant":
        found["thinking"] = told[0]
    return found


def _before(message: Mapping[str, Any]) -> dict[str, str]:
    thinking = message.get("thinking")
    parts = [thinking if isinstance(thinking, str) else "", text_of(message)]
    return {"thinking": "\n\n".join(part for part in parts if part)}
