"""Products with experts that lie in slots, and captured passes over them: in the interpreter, or on
a GPU."""

from __future__ import annotations

import pytest
from parts import PART, parts
from paths import EXPERTS
from triton_runs import INTERPRETED, needs_triton, run_checks

CHECKS = ("slot_tiles_against_torch.py", "mixtures_against_streamed.py")
"""The first in the interpreter: test_llm_slots.py."""


@needs_triton
@pytest.mark.slow
def test_captured_mixtures_are_right_in_the_interpreter() -> None:
    run_checks(INTERPRETED, EXPERTS / CHECKS[1])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", parts(9))
def test_every_captured_mixture_is_right_in_the_interpreter(part: str) -> None:
    run_checks(INTERPRETED | {"EVERY_CASE": "1", PART: part}, EXPERTS / CHECKS[1])


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("part", parts(2))
@pytest.mark.parametrize("checks", CHECKS)
def test_experts_in_slots_are_right_on_a_gpu(checks: str, part: str) -> None:
    run_checks({"TRITON_INTERPRET": "0", PART: part}, EXPERTS / checks)
