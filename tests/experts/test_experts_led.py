"""A device that brings experts by itself, in Triton's interpreter or, with -m gpu, on one."""

from __future__ import annotations

import pytest
from paths import ROOT
from triton_runs import EVERY_CASE, INTERPRETED, needs_triton, run_checks

CHECKS = ROOT / "tests" / "helpers" / "experts" / "led_by_device.py"


@needs_triton
def test_experts_that_a_device_brings_are_exact_over_the_late_fake() -> None:
    run_checks(INTERPRETED, CHECKS)


@needs_triton
@pytest.mark.slow
def test_experts_that_a_device_brings_are_exact_in_many_more_passes() -> None:
    run_checks(INTERPRETED | {EVERY_CASE: "1"}, CHECKS)


@needs_triton
@pytest.mark.gpu
def test_experts_that_a_device_brings_are_exact_on_a_gpu() -> None:
    run_checks({"TRITON_INTERPRET": "0"}, CHECKS)
