"""What tools make of an order, and of its texts, for a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...reading.begun import WHOLE, form_of
from ...reading.choice_text import ChoiceText
from ...reading.families import HARMONY, family_of, parser_of, shows_special
from ...reading.generic import generic_schema, instructions
from ...reading.reasoning import ReasoningSplitter, thinks
from ..working.served import Ready
from .order import Order
from .turns import turns_of


def fitted(order: Order, template: str | None) -> Order:
    """The order, for a model with this chat template: one that knows no tools is told of them in
    words, and held to a form in which its calls can be told."""
    family = family_of(template)
    if family == HARMONY:
        return _in_channels(order)
    if not order.tools:
        return order
    options = dict(order.options)
    if shows_special(family) and not order.forced:
        options["skip_special_tokens"] = False
    if family != "generic":
        form = None if order.forced else form_of(family, template, several=order.several)
        return replace(order, options=options, call_form=form)
    field = order.constraint_field
    if not order.forced:
        options["schema"], field = generic_schema(order.tools), "tools"
    words = instructions(order.tools, forced=order.forced)
    template_options = {k: v for k, v in order.template_options.items() if k != "tools"}
    prompts = [_told(messages, words) for messages in order.prompts]
    order = replace(order, prompts=prompts, options=options, constraint_field=field)
    return replace(order, template_options=template_options)


def messages_for(
    messages: Sequence[Mapping[str, Any]], template: str | None
) -> Sequence[Mapping[str, Any]]:
    """Messages by the names that this chat template has for what is in them."""
    return turns_of(messages) if family_of(template) == HARMONY else messages


def _in_channels(order: Order) -> Order:
    """What is constrained is the answer, in its channel."""
    form = None
    if order.forced:
        form = WHOLE
    elif order.tools:
        form = form_of(HARMONY, None, several=order.several)
    return replace(
        order,
        prompts=[turns_of(messages) for messages in order.prompts],
        options={**order.options, "skip_special_tokens": False},
        call_form=form,
        primed=order.is_constrained and not order.forced,
    )


def _told(messages: Sequence[Mapping[str, Any]], words: str) -> list[Mapping[str, Any]]:
    """Messages whose system says so as well."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": words}, *messages]
    content = first["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return [{**first, "content": f"{content}\n\n{words}"}, *messages[1:]]


def texts_of(order: Order, ready: Sequence[Ready], template: str | None) -> list[ChoiceText]:
    """What takes each text of an accepted order apart. One that is constrained is all answer: no
    reasoning fits its form."""
    family = family_of(template)
    splits = thinks(template) and not order.is_constrained and family != HARMONY
    parses = bool(order.tools) or family == HARMONY
    return [
        ChoiceText(
            ReasoningSplitter(inside=one.inside_reasoning) if splits else None,
            parser_of(family, order.tools, forced=order.forced, lead=one.lead) if parses else None,
            several=order.several,
        )
        for one in ready
    ]
