"""The check that keeps files and functions short, on files made to break it."""

import subprocess
import sys

import pytest
from paths import ROOT


def check(root) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / ".ci" / "ceilings.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write(root, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


LONG = "def long():\n" + "    pass\n" * 50
WIDE = "class A:\n    def wide(self, a, b, c, *, d, e, f, g): ...\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("layer_streamer/a.py", "x = 1\n" * 301, "layer_streamer/a.py: 301 lines"),
        ("tests/a.py", "x = 1\n" * 401, "tests/a.py: 401 lines"),
        ("examples/llm/a.py", LONG, "examples/llm/a.py:1: long() has 51 lines"),
        ("tuner/a.py", WIDE, "tuner/a.py:2: wide() has 7 parameters"),
    ],
)
def test_what_is_too_long_is_named(tmp_path, name, text, message):
    write(tmp_path, name, text)
    result = check(tmp_path)
    assert result.returncode == 1
    assert message in result.stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layer_streamer/a.py", "x = 1\n" * 300),
        ("tests/a.py", WIDE + "x = 1\n" * 390),
        ("tuner/a.py", WIDE.replace("...", "...  # noqa: PLR0913 - published")),
    ],
)
def test_what_is_just_short_enough_or_excused_passes(tmp_path, name, text):
    write(tmp_path, name, text)
    result = check(tmp_path)
    assert (result.returncode, result.stdout) == (0, "")
