"""Triton kernels, in Triton's interpreter or, with -m gpu, compiled; and who serves without."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import packed_cases as cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from interpreters import run_script
from parts import PART, part_of, parts
from paths import ENGINE, EXPERTS, PYTHONPATH
from triton_runs import CHECKS, EVERY_CASE, INTERPRETED, needs_triton, run_checks

from layer_streamer.llm.host_kernels import products
from layer_streamer.llm.kernels import fused, triton_support
from layer_streamer.llm.weights.packed import unpack_rows

TILES, SLOTS = ENGINE / "tiles_against_torch.py", EXPERTS / "slots_against_torch.py"
COMPILED = [("7.5", "float32"), ("7.5", "float16")]  # which has no bfloat16
COMPILED += [(gpu, dtype) for gpu in ("8.0", "9.0") for dtype in ("float32", "float16", "bfloat16")]


@needs_triton
def test_every_kernel_gives_what_plain_torch_gives_in_the_interpreter():
    """Those that unpack and multiply few tokens, and those on tensor cores: imported once."""
    run_checks(INTERPRETED, CHECKS, TILES)


@needs_triton
@pytest.mark.slow
def test_so_it_is_in_every_case():
    run_checks(INTERPRETED | {EVERY_CASE: "1"}, CHECKS, TILES, SLOTS)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("part", parts(5))
def test_every_kernel_gives_what_plain_torch_gives_on_a_gpu(part):
    """With nothing compiled before, each takes seconds for each variant of a kernel."""
    run_checks({"TRITON_INTERPRET": "0", PART: part})


@given(st.integers(0, 400), st.integers(1, 9))
def test_each_check_is_in_exactly_one_part(checks, count):
    split = [part_of(range(checks), part) for part in parts(count)]
    assert sorted(check for part in split for check in part) == list(range(checks))
    assert max(map(len, split)) - min(map(len, split)) <= 1


@pytest.mark.parametrize("part", ["0/2", "3/2", "2"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(ValueError):
        part_of([1, 2, 3], part)


def test_a_process_for_a_part_of_the_checks_runs_no_others(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from parts import keep_own_part as pytest_collection_modifyitems\n"
    )
    (tmp_path / "test_it.py").write_text("".join(f"def test_{i}(): pass\n" for i in range(5)))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path)],
        env=os.environ | {PART: "1/2", "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=True,
    )
    ran = set(re.findall(r"::(test_\d) PASSED", result.stdout))
    assert ran == {"test_0", "test_2", "test_4"}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), COMPILED)
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(capability, dtype, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ENGINE / "kernels_compile.py"), capability, dtype],
        env=os.environ
        | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout) > 40


NUMBERS = st.sampled_from([0, 1, 16, *(side << bits for bits in (31, 63) for side in (1, -1))])
GIVEN = st.one_of(
    st.builds(int.__add__, NUMBERS, st.integers(-17, 17)).filter(
        lambda n: -(1 << 63) <= n < 1 << 64
    ),
    st.booleans() | st.floats() | st.none(),
    st.builds(
        lambda dtype, skipped: torch.empty(40, dtype=dtype)[skipped:],
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
        st.integers(0, 33),
    ),
)


@needs_triton
@given(given=st.lists(GIVEN, min_size=2, max_size=20))
def test_what_counts_as_alike_is_alike_to_triton(given):
    """Else a kernel would run that was compiled for something else."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    found = {}
    for value in given:
        kind = native_specialize_impl(BaseBackend, value, False, True, True)
        assert found.setdefault(triton_support._kind(value), kind) == kind


def without_triton(monkeypatch) -> None:
    """As where no module of that name is found."""
    monkeypatch.setattr(triton_support, "installed", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch):
    """A GPU that is there as far as torch says, and forgotten afterwards."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    triton_support._proved.cache_clear()
    yield torch.device("cuda", 0)
    triton_support._proved.cache_clear()


def test_without_triton_plain_torch_serves_and_says_so_once(monkeypatch, one_gpu, caplog):
    without_triton(monkeypatch)
    assert not any(triton_support.triton_serves(one_gpu) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "plain torch unpacks weights, which takes longer: "
        "Triton is not installed (pip install triton)"
    ]


@needs_triton
def test_a_gpu_on_which_a_kernel_fails_is_served_by_plain_torch(monkeypatch, one_gpu, caplog):
    def fail(device):
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(triton_support, "_unpacks_one_block", fail)
    assert not triton_support.triton_serves(one_gpu)
    assert "a kernel failed: RuntimeError: Failed to find C compiler" in caplog.text


@needs_triton
def test_an_old_gpu_is_served_by_plain_torch(monkeypatch, one_gpu, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert not triton_support.triton_serves(one_gpu)
    assert "7.0 is below 7.5" in caplog.text


def test_a_cpu_is_served_by_plain_torch_without_a_word(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_support.triton_serves(torch.device("cpu"))
    assert not caplog.records


@pytest.mark.parametrize("kind", ["Q4_K", "ct4"])
def test_without_kernels_everything_is_what_plain_torch_gives(monkeypatch, kind):
    without_triton(monkeypatch)
    monkeypatch.setattr(products, "library", lambda: None)
    packed = cases.blocks(kind, 3, 512) if kind == "Q4_K" else cases.integers(kind, 3, 512, 128)
    found, expected = torch.empty(2, 3, 512).unbind(0)
    fused.unpack(packed, 0, 3, found)
    unpack_rows(packed, 0, 3, expected)
    assert torch.equal(found, expected)
    x, added, weight = torch.randn(2, 64), torch.randn(2, 64), torch.randn(64)
    assert not fused.kernel_multiplies(packed, torch.randn(1, 512))
    total, normed = fused.add_rms_norm(x, added, weight, 1e-6)
    assert torch.equal(total, x + added)
    assert torch.equal(normed, fused.rms_norm(total, weight, 1e-6))
    assert torch.equal(fused.swiglu(x.clone(), added), F.silu(x) * added)


@needs_triton
def test_the_formats_that_take_no_scratch_are_those_that_have_a_kernel():
    """In a process of its own: kernels are compiled or interpreted for good once imported."""
    code = "from layer_streamer.llm.kernels.fused import *\n"
    code += "from layer_streamer.llm.kernels.unpacking import *\n"
    code += "assert KERNEL_FORMATS == set(LAUNCHES) == set(ALTERNATIVES)"
    assert run_script(code).returncode == 0
