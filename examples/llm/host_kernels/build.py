"""The compiled form of what is here in C++: made once by this machine's compiler, then kept."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from layer_streamer import cache_path

logger = logging.getLogger(__name__)

SOURCES = tuple(map(Path(__file__).with_name, ("products.cpp", "tokens.cpp")))
HEADERS = tuple(map(Path(__file__).with_name, ("threads.h", "vectors.h")))
COMPILERS = ("c++", "g++", "clang++")
"""The first of them that there is, unless CXX names one."""
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
OF_THIS_PROCESSOR = {"x86_64": "-march=native", "AMD64": "-march=native"}
OF_OTHERS = "-mcpu=native"
FOLDER = "host_kernels"
CPUINFO = Path("/proc/cpuinfo")
PATIENCE = 300.0
"""Seconds that a compiler may take; it takes five to ten."""


class BuildError(Exception):
    """There is no compiled form, and this is why."""


def built() -> Path:
    """The shared library, for this processor. BuildError."""
    compiler, flags = _compiler(), [*FLAGS, _native()]
    key = _key(compiler, flags)
    name = f"products-{key}.so"
    found = cache_path(FOLDER, name)
    if found.is_file():
        return found
    try:
        path = cache_path(FOLDER, make=True) / name
        logger.info("compiling %s, once: it takes some seconds", path)
        _compile([*compiler, *flags], path)
    except OSError as error:
        raise BuildError(f"{error.filename or compiler[0]}: {error.strerror or error}") from None
    return path


def _compiler() -> list[str]:
    """The words that begin its command."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    there = next(filter(None, map(shutil.which, COMPILERS)), None)
    if there is None:
        raise BuildError("there is no C++ compiler (install g++ or clang, or name one in CXX)")
    return [there]


def _native() -> str:
    return OF_THIS_PROCESSOR.get(platform.machine(), OF_OTHERS)


def _key(compiler: list[str], flags: list[str]) -> str:
    """Of all that decides what comes out, and where it can run: a cache may move to a machine with
    other instructions, or another compiler."""
    version = _run([*compiler, "--version"])
    texts = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
    parts = (*texts, repr((compiler, flags)).encode(), version, processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def processor() -> bytes:
    """What tells processors with other instructions apart."""
    told = [platform.machine().encode(), platform.processor().encode()]
    try:
        lines = CPUINFO.read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(told + [line for line in lines if line.startswith(names)])


def _compile(command: list[str], path: Path) -> None:
    """Replace ``path`` in one step, so that no process loads half of it: that would kill it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".so")
    os.close(handle)
    try:
        _run([*command, "-o", temporary, *map(str, SOURCES)])
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a name must not last longer than what it names
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> bytes:
    """What a command says on stdout. BuildError, with the first thing that it complains of."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {PATIENCE:.0f} s") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror or error})") from None
    if done.returncode:
        told = done.stderr.decode(errors="replace").splitlines()
        first = next((line.strip() for line in told if "error" in line.lower()), "")
        first = first or next(filter(None, map(str.strip, told)), "it says nothing")
        raise BuildError(f"{command[0]} failed with exit code {done.returncode}: {first[:200]}")
    return done.stdout
