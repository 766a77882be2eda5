"""Passes in which every row takes one token: their kernels, and the same passes captured."""

from __future__ import annotations

import pytest
from assets import REPOSITORY
from test_llm_kernels import needs_triton, run_checks

KERNELS = REPOSITORY / "tests" / "decode_kernels_against_torch.py"


@needs_triton
def test_decode_kernels_give_what_plain_torch_gives_in_the_interpreter() -> None:
    run_checks({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, KERNELS)


@needs_triton
@pytest.mark.gpu
def test_decode_kernels_give_what_plain_torch_gives_on_a_gpu() -> None:
    run_checks({"TRITON_INTERPRET": "0"}, KERNELS)
