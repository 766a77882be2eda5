"""The page at ``/``: nothing from elsewhere, and no text that is taken for more."""

from __future__ import annotations

import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest
from serving import Running, head, serving

from layer_streamer.llm.serving.guarding.guard import Guard
from layer_streamer.llm.serving.guarding.keys import Keys
from layer_streamer.llm.serving.page import FILE

PAGE = FILE.read_text("utf-8")


def test_the_page_is_served_with_a_policy_that_allows_its_own_parts_alone(server: Running) -> None:
    reply = server.raw(head("GET", "/")).decode()
    top, _, body = reply.partition("\r\n\r\n")
    assert top.startswith("HTTP/1.1 200") and body == PAGE
    assert "content-type: text/html; charset=utf-8" in top
    policy = re.search(r"content-security-policy: (.*)", top)
    assert policy is not None
    assert "default-src 'none'" in policy[1] and "frame-ancestors 'none'" in policy[1]
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    for tag in ("script", "style"):
        (part,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = b64encode(sha256(part.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_the_page_loads_nothing_and_shows_text_as_text() -> None:
    assert not re.search(r"https?://|@import|url\(|src=|<link", PAGE)
    dangerous = ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(")
    assert not [name for name in dangerous if name in PAGE]
    assert not re.search(r"<[a-z]+[^>]*\s(on\w+|style)=", PAGE)


def test_a_browser_is_asked_for_the_key_of_the_page() -> None:
    with serving(guard=Guard(Keys(["sk-0123456789"]))) as running:
        reply = running.raw(head("GET", "/")).lower()
        assert reply.startswith(b"http/1.1 401") and b"www-authenticate: basic" in reply
        key = b64encode(b"me:sk-0123456789").decode()
        assert running.get("/", f"authorization: Basic {key}")[0] == 200


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
def test_the_script_can_be_read(tmp_path: Path) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    (tmp_path / "page.js").write_text(script)
    command = ["node", "--check", str(tmp_path / "page.js")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
