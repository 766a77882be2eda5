"""Kernels of mixtures by slot, in Triton's interpreter or, with -m gpu, compiled."""

import pytest
from paths import EXPERTS
from triton_runs import INTERPRETED, needs_triton, run_checks

CHECKS, TILES = EXPERTS / "slots_against_torch.py", EXPERTS / "slot_tiles_against_torch.py"


@needs_triton
def test_every_kernel_of_mixtures_gives_what_plain_torch_gives_in_the_interpreter():
    """Those of few tokens, and those on tensor cores: imported once."""
    run_checks(INTERPRETED, CHECKS, TILES)


@needs_triton
@pytest.mark.gpu
def test_every_kernel_of_mixtures_gives_what_plain_torch_gives_on_a_gpu():
    run_checks({"TRITON_INTERPRET": "0"}, CHECKS)
