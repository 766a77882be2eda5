"""A headless Chromium, driven through a pipe: its own protocol, and no package for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60
"""For which an answer is waited for."""
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""),
    "PageUp": (33, ""), "PageDown": (34, ""),
}  # fmt: skip
SHIFT = 8


class Page:
    """The one page of a browser, and what it has said and asked for. Thread rules: one thread."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._number, self._held = process, 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.credentials: tuple[str, str] | None = None
        """Name and password for a server that asks."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """What a command gives."""
        number = self._send(method, params)
        while True:
            found = self._read()
            if found.get("id") == number:
                assert "error" not in found, (method, found)
                return found["result"]
            self._hear(found)

    def open(self, url: str) -> None:
        """Go there, and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self._await("Page.loadEventFired")

    def reload(self) -> None:
        """As a user does."""
        self.events.clear()
        self.call("Page.reload")
        self._await("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """What an expression is worth in the page, awaited if it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + SECONDS
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"{script}: {self.text('body')}"

    def text(self, selector: str) -> str:
        """The text of an element as a reader sees it."""
        found: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def write(self, text: str) -> None:
        """As if it were typed where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, as if by hand."""
        code, text = KEYS[key]
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def click(self, selector: str) -> None:
        """The middle of an element, as if by hand."""
        x, y = self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        where = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def look(self, width: int, height: int = 800, *, dark: bool = False, scale: float = 1) -> None:
        """The size of the window, and what its user likes."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=scale, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def with_credentials(self, name: str, password: str) -> None:
        """What a user writes when a server asks for it."""
        self.credentials = (name, password)
        self.call("Fetch.enable", handleAuthRequests=True)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader finds."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in shown]

    @property
    def complaints(self) -> list[Any]:
        """Errors and all else that the console has shown since the page was opened."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in kinds]

    @property
    def asked(self) -> list[str]:
        """Addresses that it has asked for since then."""
        kind = "Network.requestWillBeSent"
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == kind]

    def _await(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self._hear(self._read())

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        return self._number

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
            assert ready, "the browser does not answer"
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _hear(self, message: dict[str, Any]) -> None:
        if "method" not in message:
            return
        self.events.append(message)
        request = message["params"].get("requestId")
        if message["method"] == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": request})
        elif message["method"] == "Fetch.authRequired":
            assert self.credentials is not None
            name, password = self.credentials
            given = {"response": "ProvideCredentials", "username": name, "password": password}
            self._send(
                "Fetch.continueWithAuth", {"requestId": request, "authChallengeResponse": given}
            )


@contextlib.contextmanager
def browsing(directory: Path) -> Iterator[Page]:
    """A page of a browser that has seen nothing yet; what it keeps goes to the directory."""
    assert CHROMIUM is not None
    # It reads commands from descriptor 3 and writes to 4.
    command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", CHROMIUM]
    command += [*FLAGS, f"--user-data-dir={directory}"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            yield Page(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its helpers, too
