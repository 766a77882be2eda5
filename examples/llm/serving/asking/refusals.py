"""What is wrong with an order, as its client is told: known once the engine has looked at it, and
before anything is computed."""

from __future__ import annotations

import re

from layer_streamer import StreamerError

from ...errors import ConstraintError, PromptTooLongError
from ..api_error import ApiError, refused
from .order import Order

_TOOL = re.compile(r"/anyOf/(\d+)(?:/properties/tool_call)?/properties/arguments")


def refusal_of(error: Exception, order: Order | None = None) -> ApiError | None:
    """OpenAI's error; None for what is no fault of the request. ``order``: what was looked at."""
    field = None if order is None else order.constraint_field
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ImportError):  # which no retry mends: so none of 500 and above
        code = "not_installed"
        return refused(field, str(error), code) if field else ApiError(400, str(error), code=code)
    if isinstance(error, ConstraintError) and field:
        return _of_constraint(str(error), field)
    if isinstance(error, ValueError | StreamerError):
        return ApiError(400, str(error), code="invalid_value")
    return None


def _of_constraint(message: str, field: str) -> ApiError:
    """With the tool, if that is what is wrong."""
    tool = _TOOL.search(message) if field == "tools" else None
    field = f"tools[{tool[1]}].function.parameters" if tool else field
    return refused(field, message.removeprefix(f"{field}: "))
