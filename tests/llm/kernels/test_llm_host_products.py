"""Products of few tokens on a processor, by what is compiled there."""

import shutil
from dataclasses import replace

import gguf
import numpy as np
import packed_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import run_script

from layer_streamer.llm.host_kernels import products
from layer_streamer.llm.host_kernels.build import COMPILERS
from layer_streamer.llm.host_kernels.library import FORMATS
from layer_streamer.llm.kernels import fused
from layer_streamer.llm.weights.packed import CT_BITS, Packed, unpack_rows
from layer_streamer.llm.weights.packed import FLOATS as FLOAT_FORMATS
from layer_streamer.llm.weights.quants import BLOCK_TYPES

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler"
)
EXTREME_SCALES = (0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, -65504, np.inf, -np.inf, np.nan)
MOST = 19
"""Tokens: more than are taken at a time."""
formats = st.sampled_from(FORMATS)
tokens = st.integers(1, MOST) | st.integers(1, 8)


def any_matrix(kind: str, rows: int, pieces: int, seed: int, **how) -> Packed:
    """Random codes, and scales of any size."""
    if kind in BLOCK_TYPES:
        return cases.blocks(kind, rows, pieces * BLOCK_TYPES[kind].weights, seed)
    if kind in CT_BITS:
        return cases.integers(kind, rows, 64 * pieces, **how)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * pieces, generator=random).to(FLOAT_FORMATS[kind])
    return Packed(format=kind, rows=rows, width=32 * pieces, parts={"weight": weight})


def weights_of(packed: Packed) -> torch.Tensor:
    """What plain unpacking finds."""
    out = torch.empty(packed.rows, packed.width)
    unpack_rows(packed, 0, packed.rows, out)
    return out


def inputs(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def check_product(packed: Packed, x_TD: torch.Tensor, weight_ND: torch.Tensor) -> None:
    """Within 1e-6 of the sum of absolute terms, and what is not finite the same."""
    assert products.multiplies(packed, x_TD)
    found = products.multiply(packed, x_TD)
    x, w = x_TD.double(), weight_ND.double()
    expected, most = x @ w.t(), x.abs() @ w.abs().t()
    finite = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[found.isinf()].double(), expected[expected.isinf()])
    assert ((found - expected).abs() <= 1e-6 * most)[finite].all()


@given(formats, st.integers(1, 11), st.integers(1, 5), tokens, st.integers(0, 99))
def test_a_product_of_few_tokens_is_that_of_the_unpacked_weights(kind, rows, pieces, count, seed):
    packed = any_matrix(kind, rows, pieces, seed)
    check_product(packed, inputs(count, packed.width, seed), weights_of(packed))


@given(formats, st.integers(1, 6), st.integers(1, 3), tokens, st.data())
def test_every_weight_is_bit_for_bit_the_unpacked_one(kind, rows, pieces, count, data):
    """Each column by itself: other terms are zeros."""
    packed = any_matrix(kind, rows, pieces, data.draw(st.integers(0, 99)))
    first = data.draw(st.integers(0, packed.width - count))
    x_TD = torch.eye(packed.width)[first : first + count]
    found = products.multiply(packed, x_TD)
    assert torch.equal(found, weights_of(packed)[:, first : first + count].t())


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in BLOCK_TYPES])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_zero_tiny_infinite_and_missing_scales_are_what_the_gguf_package_makes_of_them(kind, count):
    block, pairs = BLOCK_TYPES[kind], [(a, b) for a in EXTREME_SCALES for b in EXTREME_SCALES]
    packed = cases.blocks(kind, len(pairs), 3 * block.weights)
    raw = packed.parts["raw"].view(len(pairs), 3, block.nbytes)
    raw[:, 1], raw[:, 2] = 0, 255
    for place, values in zip(block.scales, np.array(pairs, np.float16).T, strict=False):
        stored = torch.from_numpy(values.copy()).view(torch.uint8).view(-1, 1, 2)
        raw[:, :, place : place + 2] = stored
    with np.errstate(all="ignore"):
        rows = packed.parts["raw"].numpy()
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    check_product(packed, inputs(count, packed.width), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", FORMATS)
def test_terms_of_one_sign_that_are_all_alike_do_not_drift(kind):
    """As many as the widest matrices have: roundings of equal terms add up."""
    packed = any_matrix(kind, 2, 4, seed=1)
    many = {name: part.repeat(1, 96) for name, part in packed.parts.items()}
    if kind in CT_BITS:
        many["scale"] = packed.parts["scale"]
    packed = replace(packed, width=96 * packed.width, parts=many)
    weight_ND = weights_of(packed)
    check_product(packed, weight_ND.sign().repeat(2, 1)[:3] * 0.3, weight_ND)


@settings(max_examples=40)
@given(st.sampled_from(sorted(CT_BITS)), st.sampled_from([0, 32, 64]), st.booleans(),
       st.sampled_from(cases.FLOATS), st.integers(0, 9), tokens)  # fmt: skip
def test_groups_zero_points_and_scales_of_every_dtype_serve(kind, group, zero, dtype, first, count):
    packed = any_matrix(kind, 5, 3, 0, group=group, zero=zero, dtype=dtype, first_row=first)
    check_product(packed, inputs(count, packed.width), weights_of(packed))


@pytest.mark.parametrize("kind", ["ct4", "ct8"])
def test_a_scale_that_all_rows_share_by_its_strides_serves(kind):
    packed = any_matrix(kind, 6, 2, 0)
    shared = packed.parts | {"scale": packed.parts["scale"][:1].expand(6, 1)}
    packed = replace(packed, parts=shared)
    check_product(packed, inputs(2, packed.width), weights_of(packed))


@given(formats, tokens, st.integers(1, 3), st.integers(0, 3))
def test_rows_of_a_larger_matrix_and_inputs_of_any_stride_serve(kind, count, step, first):
    whole = any_matrix(kind, 12, 2, seed=5)
    rows = slice(first, 12, step)
    parts = {name: part[rows] for name, part in whole.parts.items()}
    packed = replace(whole, rows=len(range(12)[rows]), parts=parts)
    x_TD = inputs(2 * packed.width, count).t()[:, ::2]
    check_product(packed, x_TD, weights_of(whole)[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_in_sixteen_bits_are_summed_up_in_float32_and_rounded_once(dtype):
    packed = any_matrix("Q4_1", 7, 4, seed=2)
    x_TD, bias_N = inputs(3, packed.width).to(dtype), inputs(1, 7).to(dtype)[0]
    found = products.multiply(packed, x_TD)
    assert found.dtype == dtype
    assert torch.equal(found, products.multiply(packed, x_TD.float()).to(dtype))
    assert torch.equal(fused.multiply(packed, x_TD, bias_N), found + bias_N)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_token_gets_does_not_depend_on_who_shares_the_pass(kind):
    packed = any_matrix(kind, 9, 5, seed=3)
    x_TD = inputs(MOST, packed.width)
    alone = torch.cat([products.multiply(packed, x_D) for x_D in x_TD.split(1)])
    for count in range(1, MOST + 1):
        assert torch.equal(products.multiply(packed, x_TD[:count]), alone[:count])


def test_what_kernels_do_not_take_is_left_to_unpacking():
    x_TD = torch.randn(1, 192)
    served = cases.integers("ct4", 8, 192, 64)
    assert fused.kernel_multiplies(served, x_TD)
    in_any_order = served.parts | {"g_idx": torch.zeros(192, dtype=torch.int32)}
    assert not fused.kernel_multiplies(replace(served, parts=in_any_order), x_TD)
    assert not fused.kernel_multiplies(cases.integers("ct4", 8, 192, 16), x_TD)
    assert not fused.kernel_multiplies(cases.integers("ct4", 8, 200, 0), torch.randn(1, 200))
    assert not fused.kernel_multiplies(cases.awq(8, 192, 64), x_TD)
    assert not fused.kernel_multiplies(served, x_TD.double())
    assert not fused.kernel_multiplies(served, torch.randn(products.MOST_TOKENS + 1, 192))
    assert not fused.kernel_multiplies(served, torch.randn(0, 192))
    cast = Packed(format="BF16", rows=2, width=192, parts={"weight": torch.randn(2, 192)})
    assert not fused.kernel_multiplies(cast, x_TD.bfloat16())


THREADS = """
import os, threading, torch
import packed_cases as cases
from layer_streamer.llm.host_kernels import products
packed = cases.blocks("Q8_0", 2050, 1024)
x_TD = torch.randn(3, 1024)
torch.set_num_threads(1)
alone = products.multiply(packed, x_TD)
torch.set_num_threads(5)
def right(): return torch.equal(products.multiply(packed, x_TD), alone)
"""


def run_with_threads(program: str) -> None:
    done = run_script(THREADS + program)
    assert done.returncode == 0, done.stderr


def test_any_number_of_threads_gives_the_same():
    run_with_threads("assert all(right() for _ in range(50))")


def test_several_callers_at_once_get_what_is_theirs():
    run_with_threads("""
found = []
def call(): found.extend(right() for _ in range(40))
callers = [threading.Thread(target=call) for _ in range(4)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert found == [True] * 160
""")


def test_a_forked_child_has_threads_of_its_own():
    run_with_threads("""
def threads(): return len(os.listdir("/proc/self/task"))
assert right()
before = threads()
child = os.fork()
if not child:
    there = threads() if os.path.exists("/proc/self/task") else 1
    os._exit(0 if there == 1 and right() and right() and threads() > 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert right() and threads() == before
""")


def test_threads_that_wait_for_work_take_no_time_of_a_processor():
    run_with_threads("""
import resource
assert right()
def used(): return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
lock = threading.Lock(); lock.acquire()
before = used()
lock.acquire(timeout=0.3)
assert used() - before < 0.15
""")


def test_an_interrupt_goes_to_the_interpreter_and_nothing_is_lost():
    run_with_threads("""
import signal
assert right()
blocked = [line for task in os.listdir("/proc/self/task")
           for line in open(f"/proc/self/task/{task}/status") if line.startswith("SigBlk")]
interrupt = 1 << (signal.SIGINT - 1)
assert sum(bool(int(line.split()[1], 16) & interrupt) for line in blocked) >= 2
try:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError
except KeyboardInterrupt:
    assert right()
""")
