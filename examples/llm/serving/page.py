"""The page at ``/``: a small chat, of one file, which loads nothing from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from re import DOTALL, findall

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


@cache
def _page() -> tuple[bytes, str]:
    """Its bytes, and the policy by which nothing but its own script and style is used."""
    text = FILE.read_text("utf-8")
    sources = {
        f"{kind}-src": " ".join(
            f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'"
            for part in findall(rf"<{tag}>(.*?)</{tag}>", text, DOTALL)
        )
        for kind, tag in (("script", "script"), ("style", "style"))
    }
    policy = "; ".join(
        [
            "default-src 'none'",
            *(f"{name} {value}" for name, value in sources.items()),
            "connect-src 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ]
    )
    return text.encode(), policy


async def page() -> Response:
    """The page itself."""
    body, policy = _page()
    headers = {
        "content-security-policy": policy, "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer", "cache-control": "no-cache",
    }  # fmt: skip
    return Response(body, 200, headers, media_type="text/html; charset=utf-8")
