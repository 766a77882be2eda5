"""What a line asks for: a request as OpenAI's batches have it, or a prompt alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from ..serving.api_error import ApiError, of_validation, refused
from ..serving.asking.bodies import ChatBody, CompletionBody
from ..serving.asking.order import Order, order_of_chat, order_of_completion
from ..serving.guarding.guard import check_depth
from ..serving.limits import Limits
from ..text.prompt_file import read_line
from .lines import MOST_BYTES, Shard

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
OF_A_REQUEST = {"url", "method", "body"}
"""A line that has none of these is a prompt."""
TOKENS_OF_A_PROMPT = 128
"""Of the text for such a line, where nobody says how many."""
LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How a file is answered."""

    shard: Shard = field(default_factory=Shard)
    model: str = "model"
    """Its name, in replies."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """``generate``'s, for lines that do not say so themselves; to ``seed``, a line's number less
    one is added."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template, likewise."""
    raw: bool = False
    """Prompts that are texts are continued as they are, else they are questions."""


@dataclass(slots=True)
class Asked:
    """What a line asks for."""

    order: Order
    is_chat: bool
    logprobs: bool


def read(content: bytes | None) -> Any:
    """The JSON of a line; ApiError for none."""
    if content is None:
        raise ApiError(400, f"the line is longer than {MOST_BYTES} bytes")
    check_depth(content, LIMITS.max_depth)
    try:
        return read_line(content)
    except ValueError as error:
        raise ApiError(400, " ".join(str(error).split()), code="invalid_json") from error


def id_of(found: Any) -> str | None:
    """The line's id, if it has one."""
    given = found.get("custom_id") if isinstance(found, Mapping) else None
    return given if isinstance(given, str) else None


def asked_of(found: Any, number: int, manner: Manner) -> Asked:
    """What the JSON of a line asks for; ApiError."""
    is_request = isinstance(found, Mapping) and not OF_A_REQUEST.isdisjoint(found)
    url, body = _request(found) if is_request else _prompt(found, raw=manner.raw)
    if body.get("stream"):
        raise refused("stream", "there is none in a batch")
    try:
        checked = (ChatBody if url == CHAT else CompletionBody).model_validate(body)
    except ValidationError as error:
        raise of_validation(error, body) from error
    if isinstance(checked, ChatBody):
        order, tokens = order_of_chat(checked), checked.max_completion_tokens
        logprobs = bool(checked.logprobs)
    else:
        order, tokens = order_of_completion(checked), None
        logprobs = checked.logprobs is not None
    options = {**manner.options, **order.options}
    if (tokens or checked.max_tokens) is None:
        default = options["max_new_tokens"] if is_request else TOKENS_OF_A_PROMPT
        options["max_new_tokens"] = manner.options.get("max_new_tokens", default)
    if checked.seed is None and "seed" in manner.options:
        options["seed"] = manner.options["seed"] + number - 1
    template_options = {**manner.template_options, **order.template_options}
    order = replace(order, options=options, template_options=template_options)
    LIMITS.check(order)
    return Asked(order, url == CHAT, logprobs)


def _request(found: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """URL and body of OpenAI's form."""
    if not id_of(found):
        raise refused("custom_id", "must be a text")
    if found.get("method") != "POST":
        raise refused("method", 'must be "POST"')
    if found.get("url") not in (CHAT, COMPLETION):
        raise refused("url", f"must be {CHAT} or {COMPLETION}")
    if not isinstance(found.get("body"), Mapping):
        raise refused("body", "must be an object")
    return found["url"], found["body"]


def _prompt(found: Any, *, raw: bool) -> tuple[str, Mapping[str, Any]]:
    """The same of a line of a file of prompts: a text, or an object with a prompt or messages; what
    else that has are options."""
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, Mapping):
        raise ApiError(400, "must be a request, a text, or an object with a prompt or messages")
    if ("prompt" in found) == ("messages" in found):
        raise ApiError(400, 'must have one of "prompt" and "messages"')
    if "custom_id" in found and not id_of(found):
        raise refused("custom_id", "must be a text")
    if "messages" in found:
        return CHAT, found
    prompt, rest = found["prompt"], {k: v for k, v in found.items() if k != "prompt"}
    if isinstance(prompt, str) and not raw:
        return CHAT, rest | {"messages": [{"role": "user", "content": prompt}]}
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        return CHAT, rest | {"messages": prompt}
    if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):
        raise refused("prompt", "must be a text, messages or token ids")
    return COMPLETION, found
