"""What is wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error",
    413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "unavailable_error",
}  # fmt: skip
CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


class ApiError(Exception):
    """An HTTP status, and what its body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document of the reply; also what a stream says that breaks off."""
        return {
            "error": {
                "message": str(self),
                "type": TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code or "invalid_value")


def of_validation(error: ValidationError, sent: Any) -> ApiError:
    """What pydantic found in a body that was sent."""
    return of_findings(error.errors(include_url=False, include_context=False), sent)


def of_findings(found: Sequence[Mapping[str, Any]], sent: Any) -> ApiError:
    """Of a field that may be one of several things, what is told is the finding that went furthest:
    it is about the thing that was meant."""
    told = max(found, key=lambda one: (len(_places(one["loc"], sent)), not _of_type(one)))
    places = _places(told["loc"], sent)
    if told["type"] == "missing" and told["loc"]:
        places = [*places, told["loc"][-1]]
    param = _param(places) or None
    kind = str(told["type"])
    code = CODES.get(kind, "invalid_type" if _of_type(told) else "invalid_value")
    message = " ".join(str(told["msg"]).removeprefix("Value error, ").split())
    field, _, rest = message.partition(": ")
    if (
        param is None and isinstance(sent, Mapping) and field in sent
    ):  # fields that do not go together
        param, message = field, rest
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)


def _of_type(finding: Mapping[str, Any]) -> bool:
    """True: it is another thing altogether."""
    return str(finding["type"]).endswith("_type")


def _places(loc: Iterable[Any], sent: Any) -> list[Any]:
    """The way to what is wrong, without the names of types that were tried there."""
    places = []
    for part in loc:
        known = range(len(sent)) if isinstance(sent, list) else sent
        if not isinstance(known, Mapping | range) or part not in known:
            continue
        sent = sent[part]
        places.append(part)
    return places


def _param(places: Iterable[Any]) -> str:
    """``messages[0].content``, as OpenAI writes it."""
    text = ""
    for part in places:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
