"""Kernels of mixtures against plain torch: run by test_llm_slots.py, in a process of its own.

As in ``kernels_against_torch``: in Triton's interpreter, or compiled, on a GPU.
"""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import packed_cases as cases
import pytest
import torch
from triton_runs import FEW

from layer_streamer.llm.kernels import fused, launching, slot_products
from layer_streamer.llm.kernels.triton_support import interpreted
from layer_streamer.llm.models.experts import Clamp
from layer_streamer.llm.models.mixing import clamped
from layer_streamer.llm.weights.packed import FLOATS, Packed, unpack_rows

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if interpreted() else [torch.bfloat16])
HALF = 0x2C11
"""A float16 scale of 0.0635."""
SLOTS, ROWS = 4, 2
PADDING = 48
"""Bytes behind each slot, of NaNs."""
NAN = 0xFF
"""A byte of a NaN, in every type of floats."""


def blocks(kind: str, rows: int, width: int, seed: int) -> Packed:
    return cases.with_scales(cases.blocks(kind, rows, width, seed), HALF)


def integers(kind: str, rows: int, width: int, group: int, seed: int) -> Packed:
    """With one seed for codes of the same shape, rows are turned round."""
    packed = cases.integers(kind, rows + seed, width, group)
    return replace(packed, rows=rows, parts={n: p[seed:] for n, p in packed.parts.items()})


def floats(kind: str, rows: int, width: int, seed: int) -> Packed:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random).to(FLOATS[kind])
    return Packed(format=kind, rows=rows, width=width, parts={"weight": weight})


def fp4(rows: int, width: int, seed: int) -> Packed:
    """Codes of E2M1, and exponents, the least one that there is among them."""
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, width // 2), generator=random, dtype=torch.uint8)
    scale = torch.randint(122, 131, (rows, width // 32), generator=random, dtype=torch.uint8)
    scale[:, 1] = 0
    parts = {"packed": packed, "scale": scale}
    return Packed(format="mxfp4", rows=rows, width=width, parts=parts, group=32)


BANKS = {
    "ct4": lambda rows, seed: integers("ct4", rows, 2176, 128, seed),
    "ct4, channel": lambda rows, seed: integers("ct4", rows, 96, 0, seed),
    "ct8": lambda rows, seed: integers("ct8", rows, 192, 32, seed),
    "ct8, channel": lambda rows, seed: integers("ct8", rows, 96, 0, seed),
    "Q4_0": lambda rows, seed: blocks("Q4_0", rows, 1056, seed),
    "Q8_0": lambda rows, seed: blocks("Q8_0", rows, 544, seed),
    "Q4_K": lambda rows, seed: blocks("Q4_K", rows, 512, seed),
    "mxfp4": lambda rows, seed: fp4(rows, 2112, seed),
    "F32": lambda rows, seed: floats("F32", rows, 520, seed),
    "F16": lambda rows, seed: floats("F16", rows, 520, seed),
    "BF16": lambda rows, seed: floats("BF16", rows, 520, seed),
}
if interpreted():
    del BANKS["BF16"]


def bank_of(matrices: list[Packed]) -> Packed:
    """Their parts in one slab, slot behind slot, each with what is poison to read before and
    behind its parts."""
    one = matrices[0].parts
    sizes = {n: -(-p.numel() * p.itemsize // 16) * 16 + PADDING for n, p in one.items()}
    slab = torch.full((len(matrices), PADDING + sum(sizes.values())), NAN, dtype=torch.uint8)
    slab = slab.to(DEVICE)
    parts, first = {}, PADDING
    for name, part in one.items():
        own = slab[:, first : first + part.numel() * part.itemsize]
        parts[name] = own.view(part.dtype).unflatten(1, part.shape)
        for slot, matrix in enumerate(matrices):
            parts[name][slot] = matrix.parts[name].to(DEVICE)
        first += sizes[name]
    return replace(matrices[0], parts=parts)


def matrices_of(name: str, rows: int = ROWS) -> list[Packed]:
    return [BANKS[name](rows, seed) for seed in range(SLOTS)]


def slot(bank: Packed, number: int) -> Packed:
    """Its matrix, in memory of its own."""
    return replace(bank, parts={n: p[number].clone() for n, p in bank.parts.items()})


def random_x(name: str, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    width = BANKS[name](ROWS, 0).width
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    return x.to(FLOATS.get(name, dtype)).to(DEVICE)


def numbers(*slots: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(slots, dtype=dtype, device=DEVICE)


def multiply(bank: Packed, x: torch.Tensor, slots: torch.Tensor, per_x: int = 1) -> torch.Tensor:
    (found,) = fused.multiply_slots((bank,), x, slots, per_x)
    return found


PAIRS = (3, 0, 3, 1)


@cache
def products(name: str, dtype: torch.dtype) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """A bank, two tokens, and y of PAIRS, of which two at a time share a token."""
    bank, x = bank_of(matrices_of(name)), random_x(name, 2, dtype)
    assert fused.slots_multiply(bank, x)
    return bank, x, multiply(bank, x, numbers(*PAIRS, dtype=torch.int32), 2)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", BANKS)
def test_each_pair_has_the_product_of_its_slot_and_its_row_of_x(name, dtype):
    bank, x, found = products(name, dtype)
    assert found.dtype == x.dtype and found.shape == (len(PAIRS), ROWS)
    for pair, number in enumerate(PAIRS):
        weight = torch.empty(ROWS, bank.width)
        unpack_rows(matrices_of(name)[number], 0, ROWS, weight)
        expected = (weight.double() @ x[pair // 2].double().cpu()).float()
        bound = max(torch.finfo(x.dtype).eps, 1e-6) * expected.abs().max()
        assert (found[pair].cpu().float() - expected).abs().max() < bound


OF_EACH_KERNEL = ["ct4, channel", "Q8_0", "Q4_K"]


@pytest.mark.parametrize(
    "name", OF_EACH_KERNEL if FEW else [name for name in BANKS if name not in FLOATS]
)
def test_a_pairs_bits_are_those_of_its_matrix_and_token_alone(name):
    bank, x, found = products(name, DTYPES[-1])
    for pair in (0, 3):
        one = x[pair // 2][None]
        if name == "mxfp4":  # no kernel has it of one matrix
            alone = multiply(bank, one, numbers(PAIRS[pair]))
        else:
            alone = launching.multiply(slot(bank, PAIRS[pair]), one)
        assert torch.equal(found[pair], alone[0])


@pytest.mark.parametrize("name", ["F32", "F16", "ct4, channel"])
def test_pairs_and_rows_beside_a_pair_change_none_of_its_bits(name, monkeypatch):
    bank = bank_of(matrices_of(name, 5))
    x = random_x(name, 2, torch.float32)
    alone = [multiply(bank, x[i : i + 1], numbers(i)) for i in range(2)]
    monkeypatch.setattr(launching, "WARPS", 1)
    assert torch.equal(multiply(bank, x, numbers(0, 1)), torch.cat(alone))


@pytest.mark.parametrize("name", ["ct4, channel", "F32"])
def test_a_bias_is_that_of_the_pairs_slot(name):
    bank = bank_of(matrices_of(name))
    bias = torch.full((SLOTS, 2 * ROWS + 2), float("nan"), device=DEVICE)[:, 1 : 2 * ROWS : 2]
    bias.copy_(torch.arange(SLOTS * ROWS).view(SLOTS, ROWS))
    x, slots = random_x(name, 2, DTYPES[-1]), numbers(1, 3, 0)
    expected = multiply(bank, x, slots, 2)
    biased = replace(bank, parts=bank.parts | {"bias": bias})
    expected = (expected.float() + bias[slots]).to(x.dtype)
    assert torch.equal(multiply(biased, x, slots, 2), expected)


@pytest.mark.parametrize("bias", [True] if FEW else [False, True])
@pytest.mark.parametrize("name", ["ct4, channel"] if FEW else BANKS)
def test_matrices_of_one_expert_that_lie_alike_have_the_bits_of_each_alone(name, bias):
    whole = bank_of(matrices_of(name, 2 * ROWS))
    if bias:
        values = torch.arange(SLOTS * 2 * ROWS, dtype=torch.float32, device=DEVICE)
        whole = replace(whole, parts=whole.parts | {"bias": values.view(SLOTS, 2 * ROWS)})
    halves = [
        replace(whole, rows=ROWS, parts={n: p[:, own] for n, p in whole.parts.items()})
        for own in (slice(ROWS), slice(ROWS, None))
    ]
    x, slots = random_x(name, 2, DTYPES[-1]), numbers(*PAIRS)
    apart = [next(iter(half.parts.values())).data_ptr() for half in halves]
    one_launch = (apart[1] - apart[0]) % slot_products.ALIGNMENT == 0
    assert (slot_products._steps(halves) is not None) == one_launch
    apart = [
        halves[0],
        replace(halves[1], parts={n: p.clone() for n, p in halves[1].parts.items()}),
    ]
    assert slot_products._steps(apart) is None
    for banks in (halves, halves[::-1], apart):
        with np.errstate(all="ignore"):  # of any bytes as scales, in the interpreter
            found = fused.multiply_slots(banks, x, slots, 2)
            alone = torch.stack([multiply(bank, x, slots, 2) for bank in banks])
        torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_router_has_the_logits_of_its_floats(dtype, tokens, monkeypatch):
    monkeypatch.setattr(fused, "FEW_ROWS", 256)
    weight = torch.randn(5, 520, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    x = torch.randn(tokens, 520, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    found = fused.multiply_floats(weight, x)
    assert found is not None
    expected = x.double() @ weight.double().t()
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2**-20 * (x.abs() @ weight.abs().t())
    assert found.dtype == dtype and ((found.double() - expected).abs() <= bound).all()
    for other in (weight[:, :515], weight.double(), weight.repeat(60, 1)):
        fit = x[:, : other.shape[1]].to(other.dtype)
        assert fused.multiply_floats(other, fit) is None


def test_scales_that_slots_share_are_read_by_their_strides():
    bank = bank_of(matrices_of("ct4, channel"))
    shared = bank.parts["scale"][1:2, :1]
    wide = replace(bank, parts=bank.parts | {"scale": shared.expand(SLOTS, ROWS, 1)})
    x = random_x("ct4, channel", 1, torch.float32)
    found = multiply(wide, x, numbers(2))
    alone = replace(wide, parts={n: p[2] for n, p in wide.parts.items()})
    assert torch.equal(found, launching.multiply(alone, x))


def moved(bank: Packed, part: str, nbytes: int) -> Packed:
    """The same with a part that begins so many bytes later."""
    own = bank.parts[part]
    raw = torch.zeros(own.numel() * own.itemsize + nbytes, dtype=torch.uint8, device=DEVICE)
    return replace(bank, parts=bank.parts | {part: raw[nbytes:].view(own.dtype).view(own.shape)})


def test_what_no_kernel_reads_is_not_served():
    ct4, q8, f32 = (bank_of(matrices_of(name)) for name in ("ct4", "Q8_0", "F32"))
    x = {bank.format: torch.zeros(1, bank.width, device=DEVICE) for bank in (ct4, q8, f32)}
    serves = partial(fused.slots_multiply, x_TD=x["ct4"])
    assert serves(ct4) and fused.slots_multiply(q8, x["Q8_0"])
    assert not serves(slot(ct4, 0))
    assert not serves(replace(ct4, group=16))
    assert not serves(replace(ct4, parts=ct4.parts | {"zero": ct4.parts["scale"]}))
    assert not serves(replace(ct4, parts=ct4.parts | {"g_idx": ct4.parts["scale"]}))
    assert not serves(replace(ct4, format="gptq4"))
    assert not serves(moved(ct4, "packed", 4))
    assert not fused.slots_multiply(moved(q8, "raw", 2), x["Q8_0"])
    assert fused.slots_multiply(f32, x["F32"])
    assert not fused.slots_multiply(f32, x["F32"].half())
    assert not fused.slots_multiply(f32, x["F32"].double())
    assert not fused.slots_multiply(f32, x["F32"].repeat(1, 2)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [1, 3])
def test_shares_are_added_up_in_the_order_of_the_experts(per_token, dtype):
    random = torch.Generator().manual_seed(per_token)
    tokens, width = 2, launching.COMBINE_BLOCK + 9
    y = torch.randn(tokens * per_token, width, generator=random).to(dtype).to(DEVICE)
    shares = torch.rand(tokens, per_token, generator=random).to(DEVICE)
    total = torch.zeros(tokens, width, device=DEVICE)
    for k in range(per_token):
        total += y[k::per_token].float() * shares[:, k, None]
    assert torch.equal(fused.combine(y, shares), total.to(dtype))


def routed(logits: torch.Tensor, per_token: int, *, normed: bool) -> tuple[torch.Tensor, ...]:
    """In float64 and torch's own order, then by ascending ids."""
    shares = torch.softmax(logits.double(), -1)
    ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices
    ids = ids[:, :per_token].sort(-1).values
    shares = shares.gather(1, ids)
    return ids, (shares / shares.sum(-1, keepdim=True) if normed else shares)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("count", "per_token"), [(1, 1), (5, 5), (60, 4), (128, 8), (1000, 16)])
def test_the_experts_with_the_largest_logits_are_chosen_in_ascending_order(
    count, per_token, normed
):
    random = torch.Generator().manual_seed(count)
    logits = (4 * torch.randn(3, count, generator=random)).to(DEVICE)
    ids, shares = fused.choose(logits, per_token, normed=normed, rounded=False)
    expected_ids, expected = routed(logits, per_token, normed=normed)
    assert torch.equal(ids, expected_ids) and shares.dtype == torch.float32
    torch.testing.assert_close(shares.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_experts_with_equal_logits_the_first_are_chosen(dtype):
    logits = torch.zeros(3, 40, dtype=dtype, device=DEVICE)
    logits[0, ::2] = -0.0
    logits[1, 30:] = 2.0
    logits[2, [0, 7, 39]] = float("-inf")
    ids, shares = fused.choose(logits, 3, normed=True, rounded=False)
    assert ids.tolist() == [[0, 1, 2], [30, 31, 32], [1, 2, 3]]
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 3))


def test_whatever_the_logits_are_the_chosen_are_different_experts_that_there_are():
    logits = torch.full((4, 6), float("nan"), device=DEVICE)
    logits[1] = float("-inf")
    logits[2] = float("inf")
    logits[3, 1:] = -logits[3, 1:]
    with np.errstate(all="ignore"):
        ids, _ = fused.choose(logits, 4, normed=True, rounded=True)
    assert ids.tolist() == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_are_rounded_to_the_dtype_of_the_logits_if_that_is_asked(dtype):
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    _, shares = fused.choose(logits, 4, normed=False, rounded=False)
    _, rounded = fused.choose(logits, 4, normed=False, rounded=True)
    assert torch.equal(rounded, shares.to(dtype).float())


def test_shares_over_the_chosen_are_a_softmax_of_their_logits():
    logits = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 9
    ids, shares = fused.choose(logits, 4, normed=False, rounded=False, over_chosen=True)
    expected = torch.softmax(logits.gather(1, ids), -1)
    torch.testing.assert_close(shares, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamped_gates_are_those_of_plain_torch(dtype):
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 700, generator=random).mul_(4).to(dtype) for _ in range(2))
    gate[0, :2] = torch.tensor([torch.nan, torch.inf])
    (expected,) = clamped(torch.cat((gate, up), 1).float(), Clamp(alpha=1.702, limit=5.0))
    found = fused.clamped_gates(gate.to(DEVICE), up.to(DEVICE), 1.702, 5.0).cpu()
    assert found.dtype == dtype
    bound = {torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.float(), expected, rtol=bound, atol=1e-6, equal_nan=True)
