"""Passes in which every row takes one token: their kernels, and the same passes captured."""

from __future__ import annotations

import pytest
from assets import REPOSITORY
from test_llm_kernels import needs_triton, run_checks

CHECKS = ["decode_kernels_against_torch.py", "decode_against_streamed.py"]


@needs_triton
@pytest.mark.parametrize("checks", CHECKS)
def test_captured_passes_and_their_kernels_are_right_in_the_interpreter(checks: str) -> None:
    run_checks({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, REPOSITORY / "tests" / checks)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("checks", CHECKS)
def test_captured_passes_and_their_kernels_are_right_on_a_gpu(checks: str) -> None:
    run_checks({"TRITON_INTERPRET": "0"}, REPOSITORY / "tests" / checks)
