"""What a request asks of the engine, in the engine's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...reading.begun import CallForm
from ...reading.forced import forced_schema
from ..api_error import refused
from .bodies import ChatBody, CompletionBody, EmbeddingsBody, Message, NamedTool, Sampled, Tool

DEFAULT_TOKENS = 1024
"""Of an answer, where nobody says how many: a row takes places for all of them."""
DEFAULT_COMPLETION = 16
"""As OpenAI has it."""
ALL_THERE_IS_ROOM_FOR = 1 << 31
LEAST_SHARE = 1e-9
"""For a ``top_p`` of 0, with which OpenAI and llama.cpp take the likeliest token."""
SAME_NAME = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip
CONSTRAINTS = ("schema", "regex", "grammar")
NOT_OF_CLIENTS = {
    "chat_template", "conversation", "messages", "tools", "documents", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}  # fmt: skip
"""Of ``apply_chat_template``: a template is a program, and the others say what is made of it."""


Constraints = dict[str, tuple[str, Any]]
"""What a text must follow, by the fields that say so: the engine's option, and its value."""


@dataclass(frozen=True, slots=True)
class Order:
    """Texts to be made of prompts: ``n`` of each."""

    prompts: Sequence[Any]
    """Each a text, messages, or token ids, as ``StreamingEngine.generate`` takes them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """``generate``'s, by its names."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    constraint_field: str = ""
    """Of the request, which says what texts are held to."""
    tools: Sequence[Mapping[str, Any]] = ()
    """That may be called, as OpenAI's API writes them."""
    several: bool = True
    """A text may call more than once."""
    forced: bool = False
    """The text is nothing but calls."""
    named: str = ""
    """The one tool that is to be called; "": any."""
    primed: bool = False
    """Prompts end in the head of an answer, which templates leave to the model."""
    call_form: CallForm | None = None
    """What calls look like that the text may begin by itself; None: nothing holds them to it."""
    ignore_eos: bool = False
    owner: str = ""
    """Who asks: nothing of one is shown to another, be it by how long something takes."""

    @property
    def is_constrained(self) -> bool:
        """True: the text follows a form from its first character on."""
        return any(name in self.options for name in CONSTRAINTS)

    @property
    def callable_tools(self) -> Sequence[Mapping[str, Any]]:
        """Those that a call may be of."""
        return [one for one in self.tools if self.named in ("", one["function"]["name"])]

    @property
    def count(self) -> int:
        """Texts in all."""
        return self.n * len(self.prompts)


def order_of_chat(body: ChatBody, owner: str = "") -> Order:
    """ApiError for what cannot be had together."""
    tools = [] if body.tool_choice == "none" else [tool_of(tool) for tool in body.tools or ()]
    limit = _limit(body.max_completion_tokens or body.max_tokens, DEFAULT_TOKENS)
    options = _options(body) | {"max_new_tokens": limit}
    if body.logprobs:
        options |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    named, constraint = _one(_constraints(body) | _format(body))
    forced = bool(tools) and body.tool_choice not in (None, "auto")
    if constraint and tools:
        raise refused("tools", "not together with a text that is constrained")
    if forced:
        named, constraint = _calls(tools, body)
    return Order(
        prompts=[messages_of(body.messages)],
        options=options | constraint,
        constraint_field=named,
        template_options=_template_options(body, tools),
        n=body.n or 1,
        tools=tools,
        several=several_calls(body),
        forced=forced,
        named=body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else "",
        ignore_eos=bool(body.ignore_eos),
        owner=owner,
    )


def order_of_completion(body: CompletionBody, owner: str = "") -> Order:
    """ApiError for what cannot be had together."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    limit = _limit(body.max_tokens, DEFAULT_COMPLETION)
    options = _options(body) | {"max_new_tokens": limit}
    if body.logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": body.logprobs}
    named, constraint = _one(_constraints(body))
    return Order(
        prompts=prompt if several else [prompt],
        options=options | constraint,
        constraint_field=named,
        n=body.n or 1,
        ignore_eos=bool(body.ignore_eos),
        owner=owner,
    )


def inputs_of(body: EmbeddingsBody) -> list[Any]:
    """Texts, or lists of token ids."""
    given: Any = body.input
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def several_calls(body: ChatBody) -> bool:
    """True: an answer may call more than once."""
    return body.parallel_tool_calls is not False


def tool_of(tool: Tool) -> dict[str, Any]:
    """As chat templates know it."""
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {"type": "object", "properties": {}},
        },
    }


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates know them."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    """As chat templates know it: a developer is the system to them, and the arguments of a call
    are an object, not its JSON."""
    found = message.model_dump(exclude_none=True)
    if isinstance(found.get("content"), list):
        found["content"] = [{"type": "text", "text": part["text"]} for part in found["content"]]
    if found["role"] == "developer":
        found["role"] = "system"
    if message.tool_calls:
        found["tool_calls"] = [_call(call) for call in message.tool_calls]
        found.setdefault("content", "")
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return dict(call)
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _limit(asked: int | None, default: int) -> int:
    return ALL_THERE_IS_ROOM_FOR if asked == -1 else asked or default


def _options(body: Sampled) -> dict[str, Any]:
    """What was said of sampling."""
    found = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    if body.top_p == 0:
        found["top_p"] = LEAST_SHARE
    if body.top_k is not None:
        found["top_k"] = max(body.top_k, 0)  # -1 is all, to vLLM
    if body.stop:
        found["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logit_bias:
        found["logit_bias"] = {int(key): bias for key, bias in body.logit_bias.items()}
    return found


def _constraints(body: Sampled) -> Constraints:
    """What the text must follow, by the names that vLLM has for it, or llama.cpp."""
    named = dict(body.structured_outputs or {})
    found: Constraints = {
        "guided_json": ("schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "grammar": ("grammar", body.grammar),
        "guided_grammar": ("grammar", body.guided_grammar),
    }
    for name, kind in (("json", "schema"), ("regex", "regex"), ("grammar", "grammar")):
        found[f"structured_outputs.{name}"] = kind, named.pop(name, None)
    if named := {name: value for name, value in named.items() if value is not None}:
        raise refused("structured_outputs", f"{next(iter(named))[:40]!r} is not served here")
    found = {name: one for name, one in found.items() if one[1] not in (None, "")}
    for name, (kind, value) in found.items():
        if not isinstance(value, dict if kind == "schema" and not isinstance(value, str) else str):
            raise refused(name, "must be text")
    return found


def _format(body: ChatBody) -> Constraints:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.json_schema is None or wanted.type == "json_object":
        return {"response_format": ("schema", {"type": "object"})}
    return {"response_format": ("schema", wanted.json_schema.schema_)}


def _one(found: Constraints) -> tuple[str, dict[str, Any]]:
    """The one constraint's field and option; ApiError for several."""
    if len(found) > 1:
        raise refused(list(found)[1], "only one of such may be given")
    for name, (kind, value) in found.items():
        return name, {kind: value}
    return "", {}


def _calls(tools: Sequence[Mapping[str, Any]], body: ChatBody) -> tuple[str, dict[str, Any]]:
    """Of a text that is nothing but calls, likewise."""
    choice, told = body.tool_choice, "tools"
    name = choice.function.name if isinstance(choice, NamedTool) else None
    names = [tool["function"]["name"] for tool in tools]
    if name is not None or len(names) == 1:
        told = f"tools[{names.index(name or names[0])}].function.parameters"
    return told, {"schema": forced_schema(tools, name, several=several_calls(body))}


def _template_options(body: ChatBody, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ApiError for what would be a template of the client's own."""
    found = dict(body.chat_template_kwargs or {})
    for name in NOT_OF_CLIENTS & found.keys():
        raise refused("chat_template_kwargs", f"{name!r} is not served here")
    if tools:
        found["tools"] = list(tools)
    if body.reasoning_effort is not None:
        found["reasoning_effort"] = body.reasoning_effort
    if body.continue_final_message:
        found |= {"continue_final_message": True, "add_generation_prompt": False}
    elif body.add_generation_prompt is not None:
        found["add_generation_prompt"] = body.add_generation_prompt
    return found
