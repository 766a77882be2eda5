"""Facts for a report: the GPUs that the system and its driver know of. No GPU is opened for it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from .facts import Fact, learn, one_line

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
WSL_LIBRARY = Path("/usr/lib/wsl/lib/libcuda.so.1")
NODES = (Path("/dev/nvidiactl"), DRIVER_VERSION, WSL_LIBRARY)
"""What is there if a driver is."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
"""PCI classes of displays and accelerators."""
WSL_SMI = WSL_LIBRARY.with_name("nvidia-smi")
SMI_SECONDS = 10
"""A driver that has unloaded takes a few seconds for each GPU."""
MIB = 1 << 20
GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""Generation of PCIe by its GT/s."""
FIELDS = (
    "uuid", "pci.bus_id", "name", "driver_version", "memory.total", "memory.free",
    "pcie.link.gen.current", "pcie.link.width.current", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PcieLink:
    """Of a GPU; None where it cannot be read."""

    generation: int | None
    """Now: a link at rest may go down to a slower one."""
    width: int | None
    """Lanes now."""
    most_generation: int | None
    most_width: int | None

    def __str__(self) -> str:
        """ "PCIe gen 1 of 5 x16": where it could be more, how much."""
        parts = []
        for sign, now, most in (
            ("gen ", self.generation, self.most_generation),
            ("x", self.width, self.most_width),
        ):
            if now is not None:
                parts.append(f"{sign}{now}" if most in (now, None) else f"{sign}{now} of {most}")
        return f"PCIe {' '.join(parts)}" if parts else ""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its driver lists it."""

    uuid: str
    bus: str
    """Its place on the PCI bus, as /sys names it."""
    name: str
    driver: str
    total: int | None
    """Bytes of its memory."""
    free: int | None
    link: PcieLink


@dataclass(frozen=True, slots=True)
class PciGpu:
    """A GPU on the bus, whether there is a driver for it or not."""

    slot: str
    vendor: str
    link: PcieLink


@dataclass(frozen=True, slots=True)
class SystemGpus:
    """What there is of GPUs, torch apart."""

    nodes: tuple[str, ...]
    """Those of NODES that exist."""
    pci: tuple[PciGpu, ...]
    cards: Fact[tuple[Card, ...]]
    hangs: bool
    """True if the driver gave no answer: torch would wait for it without end."""
    driver: Fact[str]
    """Version of the NVIDIA driver."""
    driver_cuda: Fact[str]
    """The newest CUDA that the driver supports."""

    @property
    def has_nvidia(self) -> bool:
        """True if there is any sign of an NVIDIA GPU."""
        on_bus = any(gpu.vendor == "NVIDIA" for gpu in self.pci)
        return bool(self.nodes or self.cards.value) or on_bus


def look_at_gpus() -> SystemGpus:
    """Ask the system and nvidia-smi. Never raises; takes at most some SMI_SECONDS."""
    pci = learn(_pci_gpus).value or ()
    hangs = False
    try:
        cards: Fact[tuple[Card, ...]] = Fact(_ask_driver())
    except subprocess.TimeoutExpired:
        hangs = True
        cards = Fact(None, f"nvidia-smi gave no answer within {SMI_SECONDS} s")
    except Exception as error:  # a report of what goes wrong has to go on
        cards = Fact(None, one_line(error))
    by_slot = {gpu.slot: gpu.link for gpu in pci}
    if cards.value is not None:
        cards = Fact(tuple(_with_link(card, by_slot.get(card.bus)) for card in cards.value))
    driver = Fact(cards.value[0].driver) if cards.value else learn(_driver_version, "no driver")
    return SystemGpus(
        nodes=tuple(str(node) for node in NODES if learn(node.exists).value),
        pci=tuple(pci),
        cards=cards,
        hangs=hangs,
        driver=driver,
        driver_cuda=learn(_driver_cuda) if not hangs else Fact(None, cards.reason),
    )


def _ask_driver() -> tuple[Card, ...]:
    """Errors: FileNotFoundError, TimeoutExpired, ValueError with what nvidia-smi said."""
    program = shutil.which("nvidia-smi") or (WSL_SMI if learn(WSL_SMI.exists).value else None)
    if program is None:
        raise FileNotFoundError("nvidia-smi is not installed")
    done = subprocess.run(
        [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        said = one_line((done.stdout + done.stderr).strip() or f"exit code {done.returncode}")
        raise ValueError(f"nvidia-smi: {said}")
    return tuple(_card(line) for line in done.stdout.splitlines() if line.strip())


def _card(line: str) -> Card:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(FIELDS):
        raise ValueError(f"nvidia-smi: {line[:80]}")
    uuid, bus, name, driver, *rest = values
    total, free, *link = [int(value) if value.isdecimal() else None for value in rest]
    # "00000000:17:00.0" is 0000:17:00.0 in /sys.
    return Card(
        uuid, bus.lower()[-12:], name, driver,
        None if total is None else total * MIB,
        None if free is None else free * MIB,
        PcieLink(*link),
    )  # fmt: skip


def _with_link(card: Card, link: PcieLink | None) -> Card:
    """The card with the system's word on its link where the driver has none."""
    return replace(card, link=link) if link is not None and not str(card.link) else card


def _pci_gpus() -> tuple[PciGpu, ...]:
    found = []
    for folder in sorted(PCI_DEVICES.iterdir()):
        vendor = VENDORS.get(_text(folder / "vendor"))
        if vendor is not None and _text(folder / "class").startswith(GPU_CLASSES):
            now, most = (_sysfs_link(folder, which) for which in ("current", "max"))
            found.append(PciGpu(folder.name, vendor, PcieLink(*now, *most)))
    return tuple(found)


def _sysfs_link(folder: Path, which: str) -> tuple[int | None, int | None]:
    """Generation and lanes, from "16.0 GT/s PCIe" and "16"."""
    speed, width = (_text(folder / f"{which}_link_{name}") for name in ("speed", "width"))
    words = speed.split()
    generation = GENERATIONS.get(float(words[0])) if words and words[0][0].isdigit() else None
    # 0 and 255 are what a link that is none says.
    lanes = int(width) if width.isdecimal() and 0 < int(width) < 255 else None
    return generation, lanes


def _driver_version() -> str | None:
    lines = DRIVER_VERSION.read_text(errors="replace").splitlines()
    return lines[0].removeprefix("NVRM version:").strip() if lines else None


def _driver_cuda() -> str | None:
    """The library of the driver says it without a GPU being opened."""
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
