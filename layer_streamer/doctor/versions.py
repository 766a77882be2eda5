"""Facts for a report: versions, the system, and whether it is a container or WSL."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..machine.hostmem import MEMBERSHIP
from .facts import Fact, Group, Line, learn

PACKAGES = ("triton", "transformers", "tokenizers", "gguf")
"""Packages that the engine uses if they are there."""
CONTAINER_FILES = ((Path("/.dockerenv"), "docker"), (Path("/run/.containerenv"), "podman"))
CONTAINER_WORDS = ("kubepods", "docker", "containerd", "libpod", "lxc")
"""Parts of a cgroup's name by which containers are known."""


@dataclass(frozen=True, slots=True)
class Versions:
    """What is installed, and where it runs."""

    layer_streamer: str
    python: str
    torch: str
    torch_build: str
    """Such as "CUDA 12.8"."""
    packages: dict[str, str]
    """Versions of those of PACKAGES that are installed."""
    kernel: str
    distribution: Fact[str]
    container: Fact[str]
    """What kind; not known where there is no sign of one."""
    wsl: bool


def look_at_versions() -> Versions:
    """Nothing is imported for it."""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    found = {name: learn(lambda name=name: metadata.version(name)).value for name in PACKAGES}  # type: ignore[misc]
    return Versions(
        layer_streamer=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        torch_build=torch_build(torch.version.cuda, torch.version.hip),
        packages={name: version for name, version in found.items() if version is not None},
        kernel=kernel,
        distribution=learn(lambda: platform.freedesktop_os_release()["PRETTY_NAME"]),
        container=learn(_container_kind, "no sign of a container"),
        wsl="microsoft" in kernel.lower(),
    )


def torch_build(cuda: str | None, hip: str | None) -> str:
    """What devices a torch of these versions was built for."""
    if cuda is not None:
        return f"CUDA {cuda}"
    return f"ROCm {hip}" if hip is not None else "a CPU build"


def describe_versions(versions: Versions) -> Group:
    """For the screen."""
    missing = [name for name in PACKAGES if name not in versions.packages]
    listed = [f"{name} {version}" for name, version in versions.packages.items()]
    if missing:
        listed.append(f"not installed: {', '.join(missing)}")
    where = [versions.kernel]
    if versions.distribution.value is not None:
        where.append(versions.distribution.value)
    if versions.wsl:
        where.append("WSL")
    container = versions.container.value
    where.append(f"{container} container" if container else versions.container.reason)
    return Group(
        "versions",
        (
            Line(
                "layer-streamer",
                f"{versions.layer_streamer}, Python {versions.python}, "
                f"torch {versions.torch} ({versions.torch_build})",
            ),
            Line("for the engine", ", ".join(listed)),
            Line("system", ", ".join(where)),
        ),
    )


def _container_kind() -> str | None:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    for file, kind in CONTAINER_FILES:
        if learn(file.exists).value:
            return kind
    named = os.environ.get("container")  # noqa: SIM112 - systemd's name for it
    if named:
        return named
    groups = MEMBERSHIP.read_text(errors="replace") if MEMBERSHIP.exists() else ""
    return next((word for word in CONTAINER_WORDS if word in groups), None)
