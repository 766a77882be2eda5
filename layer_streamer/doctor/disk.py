"""Facts for a report: the disk of a model, or of the cache folder, and direct reads there."""

from __future__ import annotations

import mmap
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.manifest import Manifest
from ..machine.cache import existing, trial_file, user_cache
from ..machine.identity import Mount, mount_of
from ..machine.libc import direct_alignment
from ..planning.budget import format_bytes
from ..planning.layout import PAGE
from ..transport.files import OpenFiles, open_direct, read_direct
from .facts import Fact, Group, Line, learn

BLOCKS = Path("/sys/class/block")
NUMBERED_BLOCKS = Path("/sys/dev/block")
REMOTE = ("nfs", "cifs", "smb", "9p", "virtiofs", "fuse", "ceph", "lustre", "beegfs", "gpfs", "afs")
"""Beginnings of the types of file systems that lie elsewhere, or behind another process."""
MOST_EXTENTS = 256
"""Tensors that are looked at to tell how much of a model is in the page cache."""


@dataclass(frozen=True, slots=True)
class DirectTrial:
    """What a direct read did when it was tried."""

    refused_at: str
    """"open" or "read"; empty if it went well."""
    said: str
    alignment: Fact[int]
    """Bytes to which such reads have to be aligned, as the system says."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """Where a model is, or what measurements and models are kept in."""

    path: str
    """The model, or where the cache folder is or would be made."""
    mount: Fact[Mount]
    medium: Fact[str]
    slow: str
    """What to do if it is a slow one; empty if it is not."""
    free: Fact[int]
    direct: Fact[DirectTrial]
    cached: Fact[float]
    """Share of the model in the page cache."""
    cache_folder: Fact[str]
    cache_fault: str
    """Why nothing can be kept there; empty if it can."""


def look_at_disk(manifest: Manifest | None) -> DiskFacts:
    """Of the model's first file; without a model, of the cache folder. Never raises."""
    folder = learn(user_cache, "there is no home directory")
    fault = folder.reason
    trial: Fact[DirectTrial] = Fact(None, "no file can be made there")
    cached: Fact[float] = Fact(None, "no model was named")
    place = existing(folder.value or Path.cwd())
    if folder.value is not None:
        try:
            with trial_file(folder.value) as file:
                trial = learn(lambda: try_direct(file))
        except OSError as error:
            fault = error.strerror or str(error)
    if manifest is not None:
        place = next(iter(manifest.files))
        trial, cached = learn(lambda: try_direct(place)), learn(lambda: _cached(manifest))
    mount = learn(lambda: mount_of(place), "it is not among the mounts")
    medium = learn(lambda: _medium(mount.value), mount.reason or "the system does not say")
    return DiskFacts(
        path=str(manifest.path if manifest is not None else place),
        mount=mount,
        medium=medium,
        slow=_slow(medium.value or "") if manifest is not None else "",
        free=learn(lambda: shutil.disk_usage(place).free),
        direct=trial,
        cached=cached,
        cache_folder=Fact(str(folder.value)) if folder.value else Fact(None, folder.reason),
        cache_fault=fault,
    )


def describe_disk(facts: DiskFacts) -> Group:
    """For the screen."""
    mount = facts.mount.text(lambda m: f"{m.type} on {m.source}, mounted at {m.point}")
    where = f"{mount}; {facts.medium.text()}; {facts.free.text(format_bytes)} free"
    lines = [
        Line("path", facts.path),
        Line("file system", where, facts.slow),
        Line("direct reads", facts.direct.text(_direct_text)),
    ]
    if facts.cached.value is not None:
        lines.append(Line("page cache", f"holds about {facts.cached.value:.0%} of the layers"))
    if facts.cache_fault:
        place = facts.cache_folder.value
        lines.append(
            Line(
                "cache folder",
                f"{place or 'none'}: {'cannot be written: ' if place else ''}{facts.cache_fault}",
                "set XDG_CACHE_HOME to a folder of yours; until then a temporary one is used",
            )
        )
    else:
        lines.append(Line("cache folder", f"{facts.cache_folder.text()}, can be written"))
    return Group("disk", tuple(lines))


def try_direct(path: Path) -> DirectTrial:
    """Open a file for direct reads and read its first page."""
    plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        alignment = learn(lambda: direct_alignment(plain))
        nbytes = min(os.fstat(plain).st_size, PAGE)
    finally:
        os.close(plain)
    try:
        descriptor = open_direct(path)
    except OSError as error:
        return DirectTrial("open", error.strerror or str(error), alignment)
    try:
        read_direct(descriptor, memoryview(mmap.mmap(-1, PAGE)), 0, nbytes, path)
    except OSError as error:
        return DirectTrial("read", error.strerror or str(error), alignment)
    finally:
        os.close(descriptor)
    return DirectTrial("", "", alignment)


def _direct_text(trial: DirectTrial) -> str:
    if trial.refused_at:
        return (
            f"refused at {trial.refused_at} ({trial.said}): files are read through the page cache"
        )
    aligned = trial.alignment.text(lambda n: f"alignment {n} bytes" if n else "said to be refused")
    return f"work ({aligned})"


def _cached(manifest: Manifest) -> float:
    specs = [spec for layer in manifest.layers for spec in layer.tensors.values()]
    some = specs[:: -(-len(specs) // MOST_EXTENTS)]
    files = OpenFiles(manifest.files)
    try:
        return files.cached_share((spec.path, spec.offset, spec.nbytes) for spec in some)
    finally:
        files.close()


def _medium(mount: Mount | None) -> str | None:
    """What bytes come from: "solid state (nvme0n1)"."""
    if mount is None:
        return None
    if mount.type in ("tmpfs", "ramfs", "hugetlbfs"):
        return "in memory: its files take of the host's"
    if mount.type.startswith(REMOTE) and mount.type != "fuseblk":
        return "not a local disk"
    if mount.type == "overlay":
        return "layers of a container"
    disk = _block_device(mount)
    if disk.name.startswith(("vd", "xvd")):
        return f"a virtual disk ({disk.name})"
    rotates = (disk / "queue" / "rotational").read_text().strip() == "1"
    return f"{'a rotating disk' if rotates else 'solid state'} ({disk.name})"


def _block_device(mount: Mount) -> Path:
    """Its disk in /sys. Raises OSError if it is on none."""
    named = BLOCKS / Path(mount.source).resolve().name
    if not mount.source.startswith("/dev/") or not named.exists():
        named = NUMBERED_BLOCKS / mount.number
    device = named.resolve(strict=True)
    return device.parent if (device / "partition").exists() else device


def _slow(medium: str) -> str:
    if medium.startswith("a rotating disk"):
        return "keep the model on a solid-state disk, or grant host memory that holds it"
    if medium.startswith("not a local disk"):
        return "copy the model to a local disk (in WSL: not below /mnt), or grant host memory"
    return ""
