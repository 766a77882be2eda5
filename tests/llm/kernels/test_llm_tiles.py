"""Products on tensor cores, in Triton's interpreter or, with -m gpu, compiled."""

import pytest
from parts import PART, parts
from paths import ENGINE
from triton_runs import needs_triton, run_checks

CHECKS = ENGINE / "tiles_against_torch.py"


@needs_triton
def test_products_on_tensor_cores_are_right_in_the_interpreter():
    run_checks({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, CHECKS)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("part", parts(4))
def test_products_on_tensor_cores_are_right_on_a_gpu(part):
    run_checks({"TRITON_INTERPRET": "0", PART: part}, CHECKS)
