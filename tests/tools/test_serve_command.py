"""The command that serves a model."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from serving import wait_for

from layer_streamer.llm.serving.guarding.keys import ENVIRONMENT
from layer_streamer.tools import serve_command
from layer_streamer.tools.cli import main


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends in an error."""
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_address_is_not_served_without_a_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "not without an API key" in failed(capsys, "model", "--host", "0.0.0.0")


def test_a_key_is_not_shown_that_cannot_be_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("secret")
    line = failed(capsys, "model", "--api-key-file", str(tmp_path / "keys"))
    assert "API key 1" in line and "secret" not in line
    assert "missing" in failed(capsys, "model", "--api-key-file", str(tmp_path / "missing"))


def test_lookup_goes_with_several_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "sk-0123456789 sk-abcdefghij")
    line = failed(capsys, str(tmp_path / "no-such"), "--port", "0", "--lookup")
    assert "no-such" in line and "--lookup" not in line


def test_a_model_that_cannot_be_opened_ends_the_command_with_its_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no-such" in failed(capsys, str(tmp_path / "no-such"), "--port", "0")


def test_it_answers_until_a_signal_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    answers: list[Any] = []
    monkeypatch.setattr(serve_command, "say", said.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = byte_model(tmp_path / "tiny")

    def ask() -> None:
        try:
            wait_for(lambda: said)
            url = re.findall(r"http://127\.0\.0\.1:\d+", said[0])[0]
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            wait_for(lambda: healthy(url))
            request = urllib.request.Request(
                f"{url}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                answers.append(json.load(reply))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    options = ["--port", "0", "--device", "cpu", "--max-length", "64", "--alias", "tiny"]
    assert main(["serve", str(path), *options]) == 0
    thread.join()
    assert answers[0]["model"] == "tiny" and answers[0]["usage"]["completion_tokens"] == 3


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=60) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
