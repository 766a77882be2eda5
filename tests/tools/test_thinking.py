"""What a model thinks before it answers, through the commands: where it goes, and how it looks."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from chain_model import chain_model
from channel_models import MARKS, TEMPLATE
from recipes import quiet

from layer_streamer.tools import cli
from layer_streamer.tools.voice import DIM, PLAIN, Voice

OPTIONS = ("--device", "cpu", "--max-new-tokens", "20", "--temperature", "0")
CHANNELS = ["<|channel|>analysis<|message|>", "Hm, é\x1b.", "<|end|>",
            "<|start|>assistant<|channel|>final<|message|>", "Well, 😀.", "<|return|>"]  # fmt: skip
THINKS = ["<think>", "Hm, é\x1b.", "</think>\n\n", "Well, 😀.", "<|im_end|>"]
THINKING = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '</think>' if false }}~"
KINDS = ("channels", "thinks")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that think "Hm, é\\x1b." and say "Well, 😀."."""
    channels, thinks = map(tmp_path_factory.mktemp, KINDS)
    special = [*MARKS, *(one for one in CHANNELS if one.endswith("<|message|>"))]
    return {
        "channels": chain_model(channels, TEMPLATE, CHANNELS, special),
        "thinks": chain_model(thinks, THINKING, THINKS, ["<|im_end|>"]),
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What main() sets in a process of its own stays out of this one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with quiet():
        yield


def main(command: str, folder: Path, *more: str) -> None:
    assert cli.main([command, str(folder), *OPTIONS, *more]) == 0


@pytest.mark.parametrize("modules", [(), ("--modules",)], ids=["engine", "modules"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_alone_is_on_stdout_and_reasoning_on_stderr(
    folders: dict[str, Path], capfd: Any, kind: str, modules: tuple[str, ...]
) -> None:
    main("generate", folders[kind], "--prompt", "Hi", *modules)
    out, err = capfd.readouterr()
    assert out == "Well, 😀." and "Hm, é\\x1b.\n" in err and "<|" not in err and "\x1b" not in err
    main("generate", folders[kind], "--prompt", "Hi", "--hide-thinking", *modules)
    out, err = capfd.readouterr()
    assert out == "Well, 😀." and "Hm" not in err


@pytest.mark.parametrize("modules", [(), ("--modules",)], ids=["engine", "modules"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_of_a_chat_shows_its_answer(
    folders: dict[str, Path], capfd: Any, monkeypatch: pytest.MonkeyPatch,
    kind: str, modules: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd then?\n"))
    main("chat", folders[kind], *modules)
    out, err = capfd.readouterr()
    assert out == "Well, 😀.\nWell, 😀.\n" and err.count("Hm, é\\x1b.\n") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_a_template_is_left_as_it_is(
    folders: dict[str, Path], capfd: Any, kind: str
) -> None:
    end = {"channels": "assistant", "thinks": "~"}[kind]
    main("generate", folders[kind], "--raw", "--prompt", end, "--show-special")
    whole = {"channels": CHANNELS, "thinks": THINKS}[kind]
    out, err = capfd.readouterr()
    assert out == "".join(whole) and "Hm" not in err
    main("generate", folders[kind], "--raw", "--prompt", end)
    assert "Hm, é\x1b." in capfd.readouterr().out
    main("generate", folders[kind], "--prompt", "Hi", "--show-special")
    assert capfd.readouterr().out == "".join(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_results_of_a_file_have_reasoning_beside_the_text(
    folders: dict[str, Path], capfd: Any, tmp_path: Path, kind: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = ["Hi", {"messages": [{"role": "user", "content": "Ho"}]}, {"no": 1}]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    main("generate", folders[kind], "--prompts", str(prompts))
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    told = [(line["text"], line["reasoning"]) for line in found[:2]]
    assert told == [("Well, 😀.", "Hm, é\x1b.")] * 2 and "error" in found[2]
    main("generate", folders[kind], "--prompts", str(prompts), "--regex", "[ab]{3}")
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert all(len(line["text"]) == 3 and "reasoning" not in line for line in found[:2])


def test_an_answer_in_channels_can_be_held_to_a_form(folders: dict[str, Path], capfd: Any) -> None:
    main("generate", folders["channels"], "--prompt", "Hi", "--regex", "[ab]{3}")
    out = capfd.readouterr().out
    assert len(out) == 3 and set(out) <= {*"ab"}


def spoken(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> tuple[str, str]:
    """On stdout, and on stderr where that is a terminal."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", terminal)
        voice = Voice()
        for tell, text in ((voice.think, "a"), (voice.think, "b\x1b["), (voice.say, "c")):
            tell(text)
        voice.end()
        terminal.close()
        shown = b""
        with suppress(OSError):  # of a terminal that nobody writes to any more
            while more := screen.read(100):
                shown += more
        return capfd.readouterr().out, shown.decode()


def test_on_a_terminal_reasoning_is_dimmed_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, err = spoken(monkeypatch, capfd)
    assert (out, err) == ("c", f"{DIM}a{PLAIN}{DIM}b\\x1b[{PLAIN}\r\n")
    monkeypatch.setenv("TERM", "dumb")
    assert spoken(monkeypatch, capfd)[1] == "ab\\x1b[\r\n"


def test_where_stderr_is_closed_the_answer_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for stream in (None, io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        voice = Voice()
        if stream is not None:
            stream.close()
        voice.think("a")
        voice.say("b")
    assert capfd.readouterr().out == "bb"
