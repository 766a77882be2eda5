"""Made-up facts of machines, for the checkup: what cannot be had where the tests run."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from layer_streamer.checkpoint.manifest import FileStamp, LayerSpec, Manifest, TensorSpec
from layer_streamer.doctor.devices import DeviceFacts, Gpu
from layer_streamer.doctor.disk import DirectTrial, DiskFacts, Mount
from layer_streamer.doctor.facts import COLUMNS, Fact
from layer_streamer.doctor.gpus import Card, PcieLink, SystemGpus
from layer_streamer.doctor.memory import LockTrial, MemoryFacts, Ulimits
from layer_streamer.doctor.model import ModelFacts, look_at_model
from layer_streamer.doctor.report import Report
from layer_streamer.doctor.versions import Versions
from layer_streamer.planning.placement import Rates, StepSize
from layer_streamer.planning.plan import Machine
from layer_streamer.planning.planner import make_plan
from layer_streamer.planning.settings import Settings

GIB = 1 << 30
FULL = PcieLink(5, 16, 5, 16)
CARD = Card("GPU-1", "0000:17:00.0", "NVIDIA GeForce RTX 4090", "570.86", 24 * GIB, 23 * GIB, FULL)
NO_GPUS = SystemGpus(
    (), (), Fact(None, "nvidia-smi is not installed"), False, Fact(None, "no driver"),
    Fact(None, "no libcuda.so.1"),
)  # fmt: skip
ONE_GPU = SystemGpus(("/dev/nvidiactl",), (), Fact((CARD,)), False, Fact("570.86"), Fact("12.8"))
CPU = DeviceFacts(
    cpu=Fact("AMD EPYC"), num_cores=2, torch="2.11.0+cpu", cuda=None, hip=None, architectures=(),
    visible=None, system=NO_GPUS, gpus=(), torch_said="", other=Fact(None, "there is none"),
)  # fmt: skip
GPU = replace(
    CPU, torch="2.11.0+cu128", cuda="12.8", architectures=("sm_80", "sm_90"), system=ONE_GPU,
    gpus=(Gpu("cuda:0", CARD.name, "sm_89", 24 * GIB, Fact(23 * GIB), "", CARD),),
)  # fmt: skip
MEMORY = MemoryFacts(
    Fact(64 * GIB), Fact(60 * GIB), Fact(0), (), Fact(Ulimits(8 << 20, None, 1024)),
    Fact("madvise"),
)  # fmt: skip
LOCKED = (LockTrial("host memory for cuda:0", 64 << 20, 64 << 20, "", True),)
DISK = DiskFacts(
    path="/models", mount=Fact(Mount("/", "ext4", "/dev/nvme0n1p2", "259:2")),
    medium=Fact("solid state (nvme0n1)"), slow="", free=Fact(100 * GIB),
    direct=Fact(DirectTrial("", "", Fact(512))), cached=Fact(None, "no model was named"),
    cache_folder=Fact("/home/me/.cache/layer-streamer"), cache_fault="",
)  # fmt: skip
MACHINE = Machine(
    devices=("cuda:0",), unified=False, maps_files=True, device_free=(23 * GIB,),
    host_available=60 * GIB, rates=Rates(2e9, (25e9,)),
)  # fmt: skip
VERSIONS = Versions(
    "0.1.0", "3.11.7", "2.11.0+cpu", "a CPU build", {"gguf": "0.19.0"}, "Linux 6.8 x86_64",
    Fact("Debian"), Fact(None, "no sign of a container"), False,
)  # fmt: skip


def report(**parts: Any) -> Report:
    """A machine at which nothing is wrong, but for ``parts``."""
    usual: dict[str, Any] = {
        "versions": VERSIONS, "devices": CPU, "memory": MEMORY, "page_locking": LOCKED,
        "disk": DISK, "model": None, "planned_for": "", "notices": (),
    }  # fmt: skip
    return Report(**usual | parts)


def marked(text: str) -> list[str]:
    """The marked lines, each with its advice."""
    rows, found = text.splitlines(), list[str]()
    for number, row in enumerate(rows):
        if row.startswith("! "):
            rest = takewhile(lambda row: row.startswith(("   ", "  ->")), rows[number + 1 :])
            found.append(" ".join(" ".join([row[2:], *rest]).split()))
    return found


def check_fits(text: str, most: int) -> None:
    """One screen: no row too wide, none that a terminal would act on, not too many."""
    rows = text.split("\n")
    assert max(map(len, rows)) <= COLUMNS
    assert all(row.isprintable() for row in rows)
    assert len(rows) <= most, len(rows)


def model_facts(machine: Machine, num_layers: int = 32, **options: Any) -> ModelFacts:
    """A model of equal layers of 466 MB, planned for ``machine``."""
    nbytes = 466_000_000
    sizes = [StepSize(nbytes, nbytes, nbytes, nbytes, nbytes)] * num_layers
    spec = TensorSpec("w", torch.uint8, (nbytes,), Path("/models/m.safetensors"), 0, nbytes)
    manifest = Manifest(
        path=Path("/models"), format="safetensors", static={},
        layers=tuple(LayerSpec(i, {"w": spec}) for i in range(num_layers)),
        files={spec.path: FileStamp(spec.path, nbytes, 0, 0)},
    )  # fmt: skip
    settings = Settings(**options)
    plan = make_plan(sizes, 0, machine, settings, lambda: 0.0)
    return look_at_model(manifest, plan, settings, 0.0)
