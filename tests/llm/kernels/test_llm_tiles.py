"""Products on tensor cores: right on a GPU; and which product serves when.

That they are right in the interpreter is seen by test_llm_kernels.py.
"""

from types import SimpleNamespace

import packed_cases as cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts import PART, parts
from paths import ENGINE
from triton_runs import needs_triton, run_checks

from layer_streamer.llm.kernels import fused
from layer_streamer.llm.kernels.thresholds import Thresholds

CHECKS = ENGINE / "tiles_against_torch.py"


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("part", parts(4))
def test_products_on_tensor_cores_are_right_on_a_gpu(part):
    run_checks({"TRITON_INTERPRET": "0", PART: part}, CHECKS)


@given(
    tokens=st.integers(1, 9),
    few=st.integers(0, 9),
    most=st.integers(0, 9),
    served=st.tuples(st.booleans(), st.booleans()),
)
def test_few_tokens_have_one_product_more_another_and_the_rest_is_unpacked(
    tokens, few, most, served
):
    modules = {
        name: SimpleNamespace(name=name, multiplies=lambda packed, x, serves=serves: serves)
        for name, serves in zip(("launching", "tiles"), served, strict=True)
    }
    counts = Thresholds(product={"ct4": few}, tiles={"ct4": most})
    packed, x = cases.integers("ct4", 1, 32), torch.empty(tokens, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_kernels", modules.__getitem__)
        patch.setattr(fused, "limits", lambda device: counts)
        found = fused._product(packed, x)
    first = served[0] and tokens <= few
    second = served[1] and tokens <= most
    expected = "launching" if first else "tiles" if second else None
    assert (found and found.name) == expected


def test_a_format_without_a_count_is_unpacked_first(monkeypatch):
    monkeypatch.setattr(fused, "_kernels", lambda name: SimpleNamespace(multiplies=bool))
    monkeypatch.setattr(fused, "limits", lambda device: Thresholds())
    assert fused._product(cases.fp8(1, 32), torch.empty(1, 32)) is None
