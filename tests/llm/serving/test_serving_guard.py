"""Who may ask: keys, hosts, origins, types and sizes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.serving.api_error import ApiError
from layer_streamer.llm.serving.asking.order import Order
from layer_streamer.llm.serving.guarding.guard import Guard, check_bind, check_depth
from layer_streamer.llm.serving.guarding.guarded import Guarded
from layer_streamer.llm.serving.guarding.keys import ENVIRONMENT, Keys
from layer_streamer.llm.serving.limits import Limits

KEY, OTHER = "sk-0123456789", "sk-abcdefghij"
LOCAL = {"host": "127.0.0.1:8000"}
JSON = {"content-type": "application/json"}


def status(guard: Guard, path: str = "/v1/models", method: str = "GET", **headers: str) -> int:
    """What a request with these headers gets; 200 if it is passed on."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        guard.check(method, path, LOCAL | named)
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (f"Bearer {KEY}", 200), (f"bearer   {KEY} ", 200), (f"Bearer {OTHER}", 200),
        (f"Bearer {KEY}x", 401), (f"Bearer {KEY[:-1]}", 401), ("Bearer ", 401), ("Bearer", 401),
        (KEY, 401), ("", 401), (f"Bearer {KEY.upper()}", 401), ("Bearer \udcff\xff", 401),
        ("Basic " + base64.b64encode(f"u:{KEY}".encode()).decode(), 200),
        ("Basic " + base64.b64encode(KEY.encode()).decode(), 401), ("Basic !!", 401),
    ],
)  # fmt: skip
def test_a_key_opens_and_nothing_like_it(authorization: str, expected: int) -> None:
    assert status(Guard(Keys([KEY, OTHER])), authorization=authorization) == expected


@given(st.text())
def test_no_other_text_is_a_key(text: str) -> None:
    assert Keys([KEY]).owner(f"Bearer {text}") is None or text.strip() == KEY


def test_a_key_is_asked_for_everywhere_but_for_health() -> None:
    guard = Guard(Keys([KEY]))
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/health/", "//health", "/x"):
        assert status(guard, path) == 401, path
    assert status(guard, "/health") == 200


def test_two_keys_are_two_owners_whose_names_tell_nothing_of_them() -> None:
    keys = Keys([KEY, OTHER])
    owners = {keys.owner(f"Bearer {key}") for key in (KEY, OTHER)}
    assert len(owners) == 2
    assert not any(part in str(owners) for part in (KEY, OTHER, "0123", "abcd"))
    assert KEY not in repr(vars(keys))


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{KEY}\n\n")
    monkeypatch.setenv(ENVIRONMENT, OTHER)
    keys = Keys.read(path)
    assert keys.owner(f"Bearer {KEY}") and keys.owner(f"Bearer {OTHER}")
    monkeypatch.delenv(ENVIRONMENT)
    assert not Keys.read(None)


@pytest.mark.parametrize("text", ["", "# none\n", "short", "with space in it", "schlüssel-lang"])
def test_a_file_without_a_good_key_is_refused_without_showing_it(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="API key") as caught:
        Keys.read(tmp_path / "keys")
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True),
        ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False),
        ("localhost.example.org", False), ("", False),
    ],
)  # fmt: skip
def test_without_a_key_nothing_but_this_machine_is_served(host: str, loopback: bool) -> None:
    check_bind(host, Keys([KEY]))
    if loopback:
        check_bind(host, Keys())
    else:
        with pytest.raises(ValueError, match="API key"):
            check_bind(host, Keys())


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8000", 200), ("[::1]:8000", 200), ("127.0.0.1", 200), ("LOCALHOST", 200),
        ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost@evil", 403),
        ("localhost:80:80", 403), ("", 403), ("localhost, evil", 403), ("[::1", 403),
    ],
)  # fmt: skip
def test_a_forged_host_is_refused_where_there_is_no_key(host: str, expected: int) -> None:
    assert status(Guard(), host=host) == expected
    assert status(Guard(), "/health", host=host) == expected
    assert status(Guard(Keys([KEY])), host=host, authorization=f"Bearer {KEY}") == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"origin": "http://127.0.0.1:8000"}, 200), ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "https://chat.example"}, 200), ({"origin": ""}, 403),
        ({"sec_fetch_site": "cross-site"}, 403), ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200), ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site", "origin": "https://chat.example"}, 200),
    ],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask_unless_they_are_named(
    headers: dict[str, str], expected: int
) -> None:
    guard = Guard(origins=["https://chat.example"])
    assert status(guard, **headers) == expected
    keyed = Guard(Keys([KEY]), origins=["https://chat.example"])
    assert status(keyed, authorization=f"Bearer {KEY}", **headers) == expected


@pytest.mark.parametrize("origin", ["*", "https://*.example", "null", "chat.example", "https://a/"])
def test_what_is_no_origin_names_no_site(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        Guard(origins=[origin])


def test_a_link_to_the_page_may_be_followed_from_anywhere() -> None:
    headers = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert status(Guard(), "/", **headers) == 200
    assert status(Guard(), "/v1/models", **headers) == 403


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/json", 200), ("application/json; charset=utf-8", 200),
        ("APPLICATION/JSON", 200), ("text/plain", 415), ("", 415), ("application/jsonp", 415),
        ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415),
        ("text/plain; application/json", 415),
    ],
)  # fmt: skip
def test_only_json_may_be_posted(kind: str, expected: int) -> None:
    assert status(Guard(), method="POST", content_type=kind) == expected


def test_a_body_in_another_encoding_is_refused() -> None:
    gzip = {"content_type": "application/json", "content_encoding": "gzip"}
    assert status(Guard(), method="POST", **gzip) == 415


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        (b"[[[]]]", True), (b"[[[[]]]]", False), (b'{"a": "[[[[["}', True), (b'"\\"[[[[["', True),
        (b'{"a":{"a":{"a":{}}}}', False), (b"[][][][][]", True), (b"\xff", False),
        (b'"\\\\"[[[[', False), (b"", True),
    ],
)  # fmt: skip
def test_json_that_is_nested_too_deep_or_no_utf_8_is_refused(body: bytes, fits: bool) -> None:
    if fits:
        check_depth(body, 3)
    else:
        with pytest.raises(ApiError):
            check_depth(body, 3)


@settings(max_examples=40)
@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.text(), inner)))  # fmt: skip
def test_depth_is_that_of_the_value(value: Any) -> None:
    def depth(item: Any) -> int:
        inner = item.values() if isinstance(item, Mapping) else item
        return 1 + max(map(depth, inner), default=0) if isinstance(item, dict | list) else 0

    body, deep = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), depth(value)
    check_depth(body, deep)
    if deep:
        with pytest.raises(ApiError):
            check_depth(body, deep - 1)


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 500_000, b"[]" * 500_000, b'"a' * 500_000])
def test_looking_for_depth_takes_a_time_that_goes_by_length(body: bytes) -> None:
    check_depth(body, 3)


def serve(messages: list[dict[str, Any]], limits: Limits, **headers: str) -> tuple[int, Any]:
    """Status, and the body that the app was given, of a POST that comes in such messages."""
    got: dict[str, Any] = {"status": 0, "body": None}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got["body"] = (await receive())["body"]
        got["status"] = 200

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Any) -> None:
        got["status"] = message.get("status", got["status"])

    heard: list[int] = []
    named = LOCAL | JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http", "method": "POST", "path": "/", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }  # fmt: skip
    asyncio.run(Guarded(app, Guard(), limits, heard.append)(scope, receive, send))
    return got["status"], got["body"]


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_parts_reaches_the_app_whole() -> None:
    assert serve([part(b"[1,", more=True), part(b"2]")], Limits()) == (200, b"[1,2]")


def test_a_body_too_large_is_refused_whatever_it_says_of_its_length() -> None:
    limits = Limits(max_body=4)
    assert serve([part(b"[1,2]")], limits, content_length="5") == (413, None)
    assert serve([part(b"[1,", more=True), part(b"2]")], limits) == (413, None)
    assert serve([part(b"[1]")], limits, content_length="9" * 30) == (413, None)
    assert serve([part(b"[1]")], limits, content_length="-1") == (413, None)
    assert serve([part(b"[12]")], limits, content_length="4") == (200, b"[12]")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    limits = Limits(body_seconds=0.01)
    assert serve([part(b"[1,", more=True)], limits) == (408, None)


@pytest.mark.parametrize(
    "order",
    [
        Order(["a"], n=17), Order(["a"] * 65), Order(["a"] * 33, n=2), Order(["a" * 1001]),
        Order([[{"role": "user", "content": [{"type": "text", "text": "a" * 1001}]}]]),
        Order([[1] * 1001]),
    ],
)  # fmt: skip
def test_an_order_that_asks_for_too_much_is_refused(order: Order) -> None:
    with pytest.raises(ApiError) as caught:
        Limits(max_prompt=1000).check(order)
    assert caught.value.status == 400
    Limits().check(Order(["a" * 1000], n=16))
