"""What was compiled, loaded: whether it serves, and its calls."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

from .build import BuildError, built

logger = logging.getLogger(__name__)

SWITCH = "LAYER_STREAMER_HOST_KERNELS"
"""An environment variable: 0, and nothing is compiled or loaded."""
MOST_TOKENS = 64
"""With more, unpacking first is as fast (Zen 4; docs/benchmarks)."""
FEW_TOKENS, FEW_LANES = 8, 4
"""The same where vectors have no more numbers, so that torch's own products may be better."""
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
    *("ct4", "ct8", "BF16", "F16"),
)
"""In the order of ``products.cpp``."""


class Matrix(ctypes.Structure):
    """A packed matrix, as ``products.cpp`` has it; strides of codes in bytes, others in numbers."""

    _fields_ = [
        ("format", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("codes_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scale_row", ctypes.c_int64),
        ("scale_column", ctypes.c_int64),
        ("zero", ctypes.c_void_p),
        ("zero_row", ctypes.c_int64),
        ("zero_column", ctypes.c_int64),
    ]


class Look(ctypes.Structure):
    """Queries, and what they look back at, as ``tokens.cpp`` has it; strides in numbers."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "memory", "runs", "mixed")),
        *((name, ctypes.c_int64) for name in ("q_head", "q_token", "heads", "groups", "width")),
        *((name, ctypes.c_int64) for name in ("tokens", "positions", "window", "num_runs")),
        ("kind", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class Library:
    """A loaded file. Its threads, which all callers share, sleep when there is nothing to do, and
    last as long as the process; a forked child has its own. Any thread may call, several at once:
    then one has the threads, and others compute alone. The interpreter's lock is not held."""

    def __init__(self, path: str) -> None:
        """OSError if it cannot be loaded; ValueError if it is not what was compiled."""
        own = ctypes.CDLL(path)
        self.name = Path(path).stem
        """Of what was compiled, how, and for which processor."""
        try:
            self._multiply, self._look = own.host_multiply, own.host_look
            self.norm, self.rotate, self.gate = own.host_norm, own.host_rotate, own.host_gate
            """As ``tokens.cpp`` has them: of addresses and numbers."""
            sizes = own.host_matrix_nbytes, own.host_look_nbytes
            self.wide = own.host_lanes() > FEW_LANES
            """Vectors are wide enough that no product of few tokens is slower than torch's."""
            self.most_tokens = MOST_TOKENS if self.wide else FEW_TOKENS
        except AttributeError as error:
            raise ValueError(str(error)) from None
        for size, kind in zip(sizes, (Matrix, Look), strict=True):
            size.restype = ctypes.c_int64
            if size() != ctypes.sizeof(kind):
                raise ValueError(f"its {kind.__name__} has another size")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._multiply.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_int]
        self._look.argtypes = [pointer, ctypes.c_int]
        self.norm.argtypes = [*[pointer] * 5, number, number, ctypes.c_float]
        self.rotate.argtypes = [*[pointer] * 4, *[number] * 5, ctypes.c_int]
        self.gate.argtypes = [pointer, pointer, number]
        for function in (self.norm, self.rotate, self.gate):
            function.restype = None

    def multiply(self, matrix: Matrix, x_TD: torch.Tensor, y_TN: torch.Tensor) -> None:
        """y = x times the transposed matrix; both float32 and contiguous. By as many threads as
        torch has, or fewer where there is little to do. MemoryError."""
        tokens, rows = y_TN.shape
        failed = self._multiply(
            ctypes.addressof(matrix),
            x_TD.data_ptr(),
            y_TN.data_ptr(),
            rows,
            tokens,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the input of a product")

    def look(self, look: Look) -> None:
        """Attention of few queries. MemoryError."""
        if self._look(ctypes.addressof(look), torch.get_num_threads()):
            raise MemoryError("no memory for a look back")


@cache
def library() -> Library | None:
    """None: nothing that is compiled serves, and a warning has said why, unless it was asked for.
    The first call may compile it."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        found = _loaded()
        if _multiplies_one_block(found):
            return found
        problem = "the compiled kernel computed wrong numbers"
    except BuildError as error:
        problem = str(error)
    except (OSError, ValueError) as error:
        problem = f"the compiled kernel cannot be loaded: {error}"
    logger.warning("plain torch computes on the processor, which takes longer: %s", problem)
    return None


def _loaded() -> Library:
    """What is kept, or where that is damaged, made again."""
    path = built()
    try:
        return Library(str(path))
    except (OSError, ValueError):
        path.unlink(missing_ok=True)
        return Library(str(built()))


def _multiplies_one_block(found: Library) -> bool:
    """Check the smallest product."""
    raw = torch.arange(34, dtype=torch.uint8, device="cpu")
    raw[:2] = torch.tensor([1.0], dtype=torch.float16, device="cpu").view(torch.uint8)
    matrix = Matrix(format=FORMATS.index("Q8_0"), rows=1, width=32, codes=raw.data_ptr())
    x_TD = torch.eye(32, dtype=torch.float32, device="cpu")[:2].contiguous()
    y_TN = torch.zeros(2, 1, dtype=torch.float32, device="cpu")
    found.multiply(matrix, x_TD, y_TN)
    return y_TN.flatten().tolist() == [2.0, 3.0]
