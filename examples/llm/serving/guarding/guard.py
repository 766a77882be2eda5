"""Who may ask, and for what: decided by the head of a request, before any of its body is read.

A program on this machine may; a page of another site, which a browser here shows, may not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from ..api_error import ApiError
from .keys import Keys

OPEN = ("/health",)
"""Asked without a key."""
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:@/\[\]]+)(?::\d{1,5})?")
_ORIGIN = re.compile(r"https?://[^/*?#@\s]+")
_BRACKETS = re.compile(r"[\[\]{}]")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
"""One that does not end goes to the end of the text: so no text is gone through twice."""


def is_loopback(host: str) -> bool:
    """True for an address, or the name, that only this machine reaches."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: Keys) -> None:
    """ValueError for a server without a key that others could reach."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host {host}: not without an API key (--api-key-file, or LAYER_STREAMER_API_KEY)"
        )


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules of one server. ValueError for an origin that is none."""

    keys: Keys = field(default_factory=Keys)
    origins: Collection[str] = ()
    """Of sites whose pages may ask, too: ``https://chat.example``."""

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin[:80]!r} is no origin, such as https://chat.example")

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> str:
        """Who asks; ApiError if they may not. ``headers``: by names in small letters."""
        if not self.keys:
            self._check_host(headers)
        self._check_site(method, path, headers)
        owner = "" if path in OPEN or not self.keys else self._owner(path, headers)
        if method == "POST":
            _check_type(headers)
        return owner

    def _owner(self, path: str, headers: Mapping[str, str]) -> str:
        owner = self.keys.owner(headers.get("authorization"))
        if owner is None:
            scheme = "Basic" if path == "/" else "Bearer"
            raise ApiError(
                401,
                "Invalid API key: send one as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": f'{scheme} realm="layer-streamer"'},
            )
        return owner

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """A name that another site has made point here is refused, whoever sends it."""
        host = _HOST.fullmatch(headers.get("host", ""))
        if host is None or not is_loopback(host[1]):
            raise ApiError(403, "Host: this server answers to localhost alone", code="host")

    def _check_site(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin in self.origins:
            return
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "Origin: pages of this site may not ask", code="origin")
        site = headers.get("sec-fetch-site", "none")
        opens = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("none", "same-origin") and not opens:
            raise ApiError(403, "Sec-Fetch-Site: pages of this site may not ask", code="origin")


def _check_type(headers: Mapping[str, str]) -> None:
    """JSON alone: what a form can send is none, so a browser asks first whether it may."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type: must be application/json", code="content_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding: is not served here", code="content_type")


def check_depth(body: bytes, most: int) -> None:
    """ApiError for JSON that is nested deeper, or that is not UTF-8."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from error
    depth = 0
    for bracket in _BRACKETS.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > most:
            raise ApiError(400, f"the body is nested deeper than {most} levels")
