"""What is typed into a terminal, through a pseudo-terminal, as a chat without a model reads it."""

from __future__ import annotations

import json
import os
import pty
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("readline")

PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
from layer_streamer.llm.text import terminal
from layer_streamer.llm.text.chat import read_lines, run_chat

class Echo:
    note = ""
    def answer(self, text):
        print("GOT", ascii(text), flush=True)
        return True

if "no-brackets" in sys.argv:
    terminal._brackets_pastes = lambda readline: False
run_chat(Echo(), read_lines(terminal.open_reader()), lambda text: print("SAID", text, flush=True))
print("END", flush=True)
"""
PASTE = "\x1b[200~{}\x1b[201~"
UP = "\x1b[A"


class Keyboard:
    """Types into a program in a pseudo-terminal and sees what it prints."""

    def __init__(self, cache: Path, *options: str) -> None:
        self.screen, child = pty.openpty()
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *options], stdin=child, stdout=child, stderr=child,
            cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def until(self, text: str) -> None:
        """Wait for it on the screen, and forget what came before it."""
        while text not in self.seen:
            assert select.select([self.screen], [], [], 60)[0], f"{text!r} never came: {self.seen}"
            try:
                found = os.read(self.screen, 4096)
            except OSError:  # Linux says so when the program has ended
                found = b""
            assert found, f"{text!r} never came: {self.seen}"
            self.seen += found.decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def press_ctrl_c(self) -> None:
        """When the program waits: Python overlooks a signal that comes right before it does."""
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()
        self.type("\x03")

    def close(self) -> None:
        os.close(self.screen)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def keyboards(tmp_path: Path) -> Iterator[list[Keyboard]]:
    opened: list[Keyboard] = []
    yield opened
    for keyboard in opened:
        keyboard.close()


def start(keyboards: list[Keyboard], cache: Path, *options: str) -> Keyboard:
    keyboards.append(Keyboard(cache, *options))
    keyboards[-1].until("> ")
    return keyboards[-1]


def test_a_pasted_text_is_one_message(keyboards: list[Keyboard], tmp_path: Path) -> None:
    keyboard = start(keyboards, tmp_path)
    keyboard.type(PASTE.format("one\n\ttwo\n\nthree") + "\r")
    keyboard.until(r"GOT 'one\n\ttwo\n\nthree'")
    keyboard.until("> ")
    keyboard.type("four\r")
    keyboard.until("GOT 'four'")


def test_a_paste_that_comes_line_by_line_is_one_message_too(
    keyboards: list[Keyboard], tmp_path: Path
) -> None:
    keyboard = start(keyboards, tmp_path, "no-brackets")
    keyboard.type("one\ntwo\n\nthree\n")
    keyboard.until(r"GOT 'one\ntwo\n\nthree'")


def test_a_line_can_be_edited_and_what_was_typed_comes_back(
    keyboards: list[Keyboard], tmp_path: Path
) -> None:
    keyboard = start(keyboards, tmp_path)
    keyboard.type("Hallo\x01-\x05!\r")  # Ctrl-A and Ctrl-E: to the begin and to the end
    keyboard.until("GOT '-Hallo!'")
    keyboard.until("> ")
    keyboard.type(UP + "?\r")
    keyboard.until("GOT '-Hallo!?'")


def test_the_next_chat_knows_what_was_typed_in_this_one(
    keyboards: list[Keyboard], tmp_path: Path
) -> None:
    first = start(keyboards, tmp_path)
    first.type(PASTE.format("caf\u00e9\ntwo") + "\r")
    first.until("GOT")
    second = start(keyboards, tmp_path)
    second.type(UP + "\r")
    second.until(r"GOT 'caf\xe9\ntwo'")
    (file,) = (tmp_path / "layer-streamer").iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["caf\u00e9\ntwo"] * 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["\xff\xfe", "{\n7\n", None])
def test_a_history_that_cannot_be_read_or_written_stops_no_chat(
    keyboards: list[Keyboard], tmp_path: Path, content: str | None
) -> None:
    if content is None:
        (tmp_path / "layer-streamer").write_text("a file where the folder should be")
    else:
        (tmp_path / "layer-streamer").mkdir()
        (tmp_path / "layer-streamer/chat_history.jsonl").write_bytes(content.encode("latin-1"))
    keyboard = start(keyboards, tmp_path)
    keyboard.type("Hi\r")
    keyboard.until("GOT 'Hi'")
    keyboard.until("> ")
    keyboard.type(UP + "\r")
    keyboard.until("GOT 'Hi'")


def test_ctrl_c_throws_a_line_away_and_two_in_a_row_end_the_chat(
    keyboards: list[Keyboard], tmp_path: Path
) -> None:
    keyboard = start(keyboards, tmp_path)
    keyboard.type("never")
    keyboard.until("never")
    keyboard.press_ctrl_c()
    keyboard.until("SAID (once more")
    keyboard.until("> ")
    keyboard.type("Hi\r")
    keyboard.until("GOT 'Hi'")
    keyboard.until("> ")
    keyboard.press_ctrl_c()
    keyboard.until("> ")
    keyboard.press_ctrl_c()
    keyboard.until("END")


def test_ctrl_d_ends_the_chat(keyboards: list[Keyboard], tmp_path: Path) -> None:
    keyboard = start(keyboards, tmp_path)
    keyboard.type("\x04")
    keyboard.until("END")
    assert keyboard.process.wait(60) == 0


def test_through_a_pipe_each_line_is_a_message_and_nothing_is_kept(tmp_path: Path) -> None:
    program = PROGRAM.replace("fcntl.ioctl", "# ")
    found = subprocess.run(
        [sys.executable, "-c", program], input="one\n\n/new\u00e9\ntwo\n", capture_output=True,
        text=True, encoding="utf-8", check=True, cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert [line for line in found.stdout.splitlines() if not line.startswith("SAID")] == [
        "GOT 'one'", r"GOT '/new\xe9'", "GOT 'two'", "END",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []
