"""Takes docs/pictures/page.png: the page of ``layer-streamer serve``, after a question.

Run from anywhere: ``python docs/pictures/draw_page.py``. Needs a chromium in PATH, and the small
model that ``make demo`` downloads. The answer is the model's own, and the numbers below it are of
the machine on which this runs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

TARGET = Path(__file__).with_name("page.png")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples/make"), str(ROOT / "tests/helpers/serving")]

from browser import browsing  # noqa: E402
from fetch_model import fetch  # noqa: E402

QUESTION = "Explain photosynthesis in one sentence."
OPTIONS = (
    "--device", "cpu", "--device-budget", "144MiB", "--max-length", "1024",
    "--alias", "SmolLM2-135M-Instruct",
)  # fmt: skip
SIZE = (800, 360)


@contextmanager
def served() -> Iterator[str]:
    """The address of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "layer_streamer", "serve", str(fetch()), *OPTIONS]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, "--port", str(port)], env=paths) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/health", process)
            yield f"{url}/"
        finally:
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers with 200."""
    while process.poll() is None:
        try:
            with urlopen(url):
                return
        except URLError:
            time.sleep(0.2)
    raise SystemExit("the server has ended")


def draw(target: Path) -> None:
    """Ask, and take a picture of the answer."""
    with (
        served() as url,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browsing(Path(profile)) as page,
    ):
        page.look(*SIZE, scale=1.5)
        page.open(url)
        page.wait("document.querySelector('#where').innerText")
        page.write(QUESTION)
        page.press("Enter")
        page.wait("document.querySelector('#told').innerText")
        page.picture(target)


if __name__ == "__main__":
    draw(TARGET)
    print(TARGET)
