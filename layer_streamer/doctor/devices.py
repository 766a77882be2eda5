"""Facts for a report: the devices that torch can use, and why it cannot use one that is there."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass

import torch

from ..devices.accelerator import check_architecture
from ..errors import ConfigError
from ..machine.identity import this_machine
from .facts import Fact, Group, Line, learn, one_line
from .gpus import Card, SystemGpus, look_at_gpus
from .versions import torch_build

MOST_GPUS = 8
"""Lines for GPUs."""
GET_TORCH = "install a CUDA build of torch: pytorch.org/get-started/locally"
LOW_WIDTH = 8
"""Lanes; a narrower link is a warning if the GPU could have more."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it."""

    device: str
    """torch's name: "cuda:0"."""
    name: str
    architecture: str
    """Such as "sm_90": its compute capability."""
    total: int
    free: Fact[int]
    trouble: str
    """Why this torch cannot use it; empty if it can."""
    card: Card | None
    """The same GPU as the driver lists it, if that was found."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What there is to compute on."""

    cpu: Fact[str]
    num_cores: int
    torch: str
    cuda: str | None
    """The CUDA that torch was built for; None: it was not."""
    hip: str | None
    architectures: tuple[str, ...]
    visible: str | None
    """CUDA_VISIBLE_DEVICES; None: not set."""
    system: SystemGpus
    gpus: tuple[Gpu, ...]
    torch_said: str
    """What torch said of CUDA when it was asked; empty if nothing."""
    other: Fact[str]
    """Another kind of accelerator."""


def look_at_devices() -> DeviceFacts:
    """Never raises. Where nvidia-smi works, no GPU is opened for it."""
    system = look_at_gpus()
    gpus: tuple[Gpu, ...] = ()
    said, num_cores = system.cards.reason, os.cpu_count()
    cpu = learn(platform.machine)
    other: Fact[str] = Fact(None, "torch was not asked")
    if not system.hangs:
        gpus, said = _ask_torch(system.cards.value or ())
        identity = learn(this_machine)
        if identity.value is not None:
            cpu, num_cores = Fact(identity.value.cpu), identity.value.num_cores
        other = learn(_other_accelerator, "there is none")
    return DeviceFacts(
        cpu=cpu,
        num_cores=num_cores or 1,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        architectures=tuple(torch.cuda.get_arch_list()) if gpus else (),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        system=system,
        gpus=gpus,
        torch_said=said,
        other=other,
    )


def explain(facts: DeviceFacts) -> tuple[str, str] | None:
    """Why torch sees no GPU although there is one, and what to do; None if nothing is wrong."""
    system = facts.system
    if facts.gpus or not system.has_nvidia:
        return None
    if system.hangs:
        return system.cards.reason, "look into dmesg: the driver hangs; a restart may help"
    if facts.cuda is None:
        verb = "is" if facts.hip is None else "was built for"
        return f"torch {facts.torch} {verb} {torch_build(None, facts.hip)}", GET_TORCH
    if _hides_all(facts.visible, len(system.cards.value or ())):
        return f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides every GPU", "unset it"
    if not system.nodes and not system.cards.value:
        return (
            f"no driver is loaded for it ({system.cards.reason})",
            "install NVIDIA's driver; a container needs --gpus all",
        )
    return _driver_trouble(facts, facts.cuda)


def _driver_trouble(facts: DeviceFacts, cuda: str) -> tuple[str, str]:
    """Why a driver that is there does not do for a torch that was built for ``cuda``."""
    system = facts.system
    supported = system.driver_cuda.value
    if supported is not None and float(supported) // 1 < float(cuda) // 1:
        return (
            f"driver {system.driver.text()} supports CUDA {supported} at most, "
            f"torch {facts.torch} was built for CUDA {cuda}",
            f"update the driver, or install a torch built for CUDA {supported} or older",
        )
    return (
        f"torch says: {facts.torch_said}" if facts.torch_said else "torch does not see it",
        "see whether nvidia-smi works; a container needs --gpus all",
    )


def _hides_all(visible: str | None, num_cards: int) -> bool:
    """True if CUDA_VISIBLE_DEVICES leaves no GPU: it counts up to the first that is none."""
    if visible is None:
        return False
    first = visible.split(",")[0].strip()
    if first.isdecimal():
        return 0 < num_cards <= int(first)
    return not first.startswith(("GPU-", "MIG-"))


def describe_devices(facts: DeviceFacts) -> Group:
    """For the screen."""
    lines = [Line("cpu", f"{facts.cpu.text()}, {facts.num_cores} cores")]
    lines += [_gpu_line(gpu) for gpu in facts.gpus[:MOST_GPUS]]
    if len(facts.gpus) > MOST_GPUS:
        lines.append(Line("", f"and {len(facts.gpus) - MOST_GPUS} more"))
    trouble = explain(facts)
    if trouble is not None:
        lines.append(Line("gpu", f"{_found(facts.system)}: {trouble[0]}", trouble[1]))
    elif not facts.gpus:
        lines.append(Line("gpu", _without_gpu(facts)))
    if facts.system.driver.value is not None:
        supported = facts.system.driver_cuda.text()
        lines.append(Line("driver", f"{facts.system.driver.value}, for CUDA {supported} at most"))
    hidden = len(facts.system.cards.value or ()) - len(facts.gpus)
    if facts.visible and facts.gpus and hidden > 0:
        lines.append(Line("", f"CUDA_VISIBLE_DEVICES={facts.visible} hides {hidden} more"))
    return Group("devices", tuple(lines))


def _ask_torch(cards: tuple[Card, ...]) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that torch sees, and what it said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(_gpu(index, cards) for index in range(count))
        except Exception as error:  # drivers fail in many ways
            return (), one_line(error)
    return gpus, one_line(caught[0].message) if caught else ""


def _gpu(index: int, cards: tuple[Card, ...]) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    uuid = str(getattr(found, "uuid", "unknown"))
    card = next((card for card in cards if card.uuid.removeprefix("GPU-") == uuid), None)
    trouble = ""
    try:
        check_architecture(index)
    except ConfigError as error:
        trouble = str(error).removeprefix(f"device=cuda:{index}: ")
    if card is not None and card.free is not None:
        free = Fact(card.free)
    else:
        free = learn(lambda: torch.cuda.mem_get_info(index)[0])
    architecture = f"sm_{found.major}{found.minor}"
    if torch.version.hip is not None:
        architecture = str(found.gcnArchName)
    return Gpu(f"cuda:{index}", found.name, architecture, found.total_memory, free, trouble, card)


def _other_accelerator() -> str | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "cuda" else found.type


def _gpu_line(gpu: Gpu) -> Line:
    if gpu.trouble:
        what, _, advice = gpu.trouble.partition("; ")
        return Line(gpu.device, what, advice or GET_TORCH)
    free = gpu.free.text(lambda nbytes: f"{nbytes / 2**30:.1f}")
    text = f"{gpu.name} ({gpu.architecture}), {free} of {gpu.total / 2**30:.1f} GiB free"
    link = gpu.card.link if gpu.card is not None else None
    if link is None:
        return Line(gpu.device, text)
    width, most = link.width, link.most_width
    advice = ""
    if width is not None and most is not None and width < LOW_WIDTH <= most:
        advice = f"copies go {most // width} times slower than they could: look at slot and riser"
    return Line(gpu.device, f"{text}, {link}".removesuffix(", "), advice)


def _found(system: SystemGpus) -> str:
    """What is there of an NVIDIA GPU."""
    if system.cards.value:
        return ", ".join(sorted({card.name for card in system.cards.value}))
    slots = [gpu.slot for gpu in system.pci if gpu.vendor == "NVIDIA"]
    place = f"at PCI {', '.join(slots[:2])}" if slots else ", ".join(system.nodes)
    return f"an NVIDIA GPU ({place})"


def _without_gpu(facts: DeviceFacts) -> str:
    if facts.other.value is not None:
        return f"none of NVIDIA's; torch has {facts.other.value}"
    amd = [gpu.slot for gpu in facts.system.pci if gpu.vendor == "AMD"]
    if amd:
        return f"an AMD one at PCI {amd[0]}, for a ROCm build of torch; the CPU computes"
    return "none found: the CPU computes"
