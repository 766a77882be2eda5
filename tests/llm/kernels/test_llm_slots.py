"""Kernels of mixtures by slot, in Triton's interpreter or, with -m gpu, compiled."""

import pytest
from paths import ROOT
from triton_runs import needs_triton, run_checks

CHECKS = ROOT / "tests" / "helpers" / "experts" / "slots_against_torch.py"


@needs_triton
def test_every_kernel_of_mixtures_gives_what_plain_torch_gives_in_the_interpreter():
    run_checks({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, CHECKS)


@needs_triton
@pytest.mark.gpu
def test_every_kernel_of_mixtures_gives_what_plain_torch_gives_on_a_gpu():
    run_checks({"TRITON_INTERPRET": "0"}, CHECKS)
