"""Whether Triton's kernels serve a device: it is optional, and must have proved itself there."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (7, 5)


def triton_serves(device: torch.device) -> bool:
    """True: kernels can be launched on this device. Where they could have been, but cannot, plain
    torch serves, and a warning says why, once."""
    if device.type == "cpu":
        return interpreted() and installed()
    index = device.index or 0
    return device.type == "cuda" and index < torch.cuda.device_count() and _proved(index)


def installed() -> bool:
    """True: there is a module of that name."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """True: kernels are run by Triton's interpreter, on the CPU, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _proved(index: int) -> bool:
    problem = _problem(torch.device("cuda", index))
    if problem is not None:
        logger.warning("plain torch unpacks weights, which takes longer: %s", problem)
    return problem is None


def _problem(device: torch.device) -> str | None:
    """Why kernels cannot serve this GPU."""
    if not installed():
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    try:
        with torch.cuda.device(device), torch.inference_mode():
            right = _unpacks_one_block(device)
    except Exception as error:  # compilers and drivers fail in ways of their own
        first_line = str(error).strip().partition("\n")[0]
        return f"a kernel failed: {type(error).__name__}: {first_line}"
    return None if right else "a kernel computed wrong numbers"


def _unpacks_one_block(device: torch.device) -> bool:
    """Compile, launch and check the smallest kernel."""
    from ..weights.packed import Packed
    from .unpacking import launch_unpack

    raw = torch.arange(34, dtype=torch.uint8, device="cpu")
    raw[:2] = torch.tensor([1.0], dtype=torch.float16, device="cpu").view(torch.uint8)
    packed = Packed(format="Q8_0", rows=1, width=32, parts={"raw": raw[None].to(device)}, group=32)
    out = torch.zeros(1, 32, dtype=torch.float32, device=device)
    launch_unpack(packed, 0, 1, out)
    return torch.equal(out[0].cpu(), torch.arange(2.0, 34.0, dtype=torch.float32, device="cpu"))
