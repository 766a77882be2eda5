"""Whether Triton's kernels serve a device: it is optional, and must have proved itself there."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (7, 5)


def triton_serves(device: torch.device) -> bool:
    """True: kernels can be launched on this device. Where they could have been, but cannot, plain
    torch serves, and a warning says why, once."""
    if device.type == "cpu":
        return interpreted() and installed()
    return device.type == "cuda" and _proved(device.index or 0)


def run_kernel(kernel: Any, grid: tuple[int, ...], *given: Any, **named: Any) -> None:
    """``kernel[grid](*given, **named)`` on the current stream. Of launches alike only the first is
    looked at by Triton, which takes the host longer than the launch (28 of 48 us, beside an H200):
    what a pass over many tokens enqueues may wait for that.

    ``named``: constants of the kernel, and options. ``given``: a tensor, and what Triton tells
    launches apart by the kind of.
    """
    alike = id(kernel), given[0].get_device(), *named.items(), *map(_kind, given)
    known = _launched.get(alike)
    if known is not None:
        compiled, rest, _ = known
        compiled[(*grid, 1, 1)[:3]](*given, *rest)
        return
    compiled = kernel[grid](*given, **named)
    if compiled is not None:  # as it is of an interpreter
        rest = [named[name] for name in kernel.arg_names[len(given) :]]
        # And the kernel, or another could come to have its id.
        _launched[alike] = compiled, rest, kernel


_launched: dict[tuple[Any, ...], tuple[Any, list[Any], Any]] = {}


def _kind(value: Any) -> Any:
    """What Triton compiles a kernel anew for: of pointers and numbers, multiples of 16, too."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if isinstance(value, int):
        bounds = -(1 << 31) <= value < 1 << 31, value < 1 << 63
        return type(value), value == 1, value & 15 == 0, bounds
    return type(value)


def installed() -> bool:
    """True: there is a module of that name."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """True: kernels are run by Triton's interpreter, on the CPU, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _proved(index: int) -> bool:
    if index >= torch.cuda.device_count():
        return False
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
