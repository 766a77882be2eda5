"""Products of many tokens with experts in slots, against plain torch: run by
test_llm_slot_products.py, in a process of its own, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import packed_cases as cases
import pytest
import torch
from tiles_against_torch import DEVICE, DTYPES, blocks, random_x, rows_of

from layer_streamer.llm.kernels import slot_tiles
from layer_streamer.llm.weights.packed import Packed

SLOTS, ROWS, PER_TOKEN = 5, 70, 2


def matrix(kind: str, seed: int) -> Packed:
    torch.manual_seed(seed)
    if kind == "ct4":
        return cases.integers("ct4", ROWS, 160, 32, dtype=torch.float16)
    if kind == "ct8, channel":
        return cases.integers("ct8", ROWS, 96)
    if kind == "mxfp4":
        return fp4()
    return blocks(kind, ROWS, 512 if kind in ("Q4_K", "Q6_K") else 160)


def fp4() -> Packed:
    """With a bias, and rows that take turns with those of another matrix."""
    packed = torch.randint(0, 256, (2 * ROWS, 80), dtype=torch.uint8)[1::2]
    scale = torch.randint(118, 126, (2 * ROWS, 5), dtype=torch.uint8)[1::2]
    parts = {"packed": packed, "scale": scale, "bias": torch.randn(2 * ROWS)[1::2]}
    return Packed(format="mxfp4", rows=ROWS, width=160, parts=parts, group=32)


def bank_of(matrices: list[Packed]) -> Packed:
    """In slots as a pool has them, which have some bytes more than the matrix."""
    parts = {}
    for name, first in matrices[0].parts.items():
        step = 2 if name == "bias" else 1  # of one that takes turns with another's
        slab = torch.full((len(matrices), step * first.numel() + 64), 127, dtype=first.dtype)
        bank = slab[:, 16 : 16 + step * first.numel() : step].unflatten(1, first.shape)
        for slot, own in enumerate(matrices):
            bank[slot] = own.parts[name]
        parts[name] = bank
    return replace(matrices[0], parts=parts)


def routed(ids_TK: torch.Tensor, slots: dict[int, int]) -> slot_tiles.Routed:
    """As the engine has it: experts ascending, pairs of each by tokens."""
    sorted_P, order_P = ids_TK.flatten().sort(stable=True)
    count = max(int(ids_TK.max()), *slots) + 1
    ends = torch.searchsorted(sorted_P, torch.arange(count), right=True).tolist()
    return slot_tiles.route(order_P.to(DEVICE), ends, sorted(slots.items()))


def chosen(tokens: int, experts: int) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.stack([torch.randperm(experts)[:PER_TOKEN].sort().values for _ in range(tokens)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q4_0", "Q8_0", "ct4", "ct8, channel", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_each_pair_is_multiplied_by_its_own_expert(
    kind: str, tokens: int, dtype: torch.dtype
) -> None:
    matrices = [matrix(kind, seed) for seed in range(SLOTS)]
    bank = cases.on(bank_of(matrices), DEVICE)
    ids_TK, slots = chosen(tokens, 4), {0: 3, 1: 0, 2: 4, 3: 1}
    x_TD = random_x(tokens, bank.width, dtype)
    assert slot_tiles.multiplies(bank, x_TD.to(DEVICE))
    pairs, found = routed(ids_TK, slots), torch.full((tokens * PER_TOKEN, ROWS), torch.nan)
    found = found.to(DEVICE, dtype)
    slot_tiles.multiply(bank, x_TD.to(DEVICE), pairs, found, per_token=PER_TOKEN)
    half_ulp = torch.finfo(dtype).eps / 2
    for at, pair in enumerate(pairs.order_P.tolist()):
        own = matrices[slots[int(ids_TK.flatten()[pair])]]
        weight, x = rows_of(own, dtype).double(), x_TD[pair // PER_TOKEN].double()
        product, bias = weight @ x, own.parts.get("bias", torch.zeros(ROWS)).double()
        error = (found[at].cpu().double() - product - bias).abs()
        rounded = product.abs() + (product + bias).abs() * ("bias" in own.parts)
        assert (error <= 1.01 * half_ulp * rounded + 2**-20 * (weight.abs() @ x.abs())).all()


IDS = {
    "of all experts": chosen(300, 5),
    "of one expert alone": torch.full((45, 1), 3),
    "of the first and the last": torch.tensor([[0, 4]] * 33),
    "of more than a program looks at": torch.arange(2500).view(-1, 1) * 7 % 5,
    "one": torch.tensor([[4]]),
}


@pytest.mark.parametrize("ids_TK", IDS.values(), ids=IDS.keys())
def test_the_device_sorts_pairs_and_shares_them_out_as_the_host_does(ids_TK: torch.Tensor) -> None:
    slots = torch.tensor([4, 2, 0, 1, 3])
    found = slot_tiles.route_all(ids_TK.to(DEVICE), slots.to(DEVICE))
    expected = routed(ids_TK, dict(enumerate(slots.tolist())))
    assert torch.equal(found.order_P, expected.order_P) and found.order_P.dtype == torch.int32
    tiles, other = found.tiles_N3.tolist(), expected.tiles_N3.tolist()
    assert found.at_once == expected.at_once
    assert [tile for tile in tiles if tile[1] != tile[2]] == other
    assert all(0 <= slot < 5 and 0 <= first <= end for slot, first, end in tiles)


def test_programs_without_pairs_write_nothing() -> None:
    matrices = [matrix("Q4_0", seed) for seed in range(SLOTS)]
    bank, ids_TK = cases.on(bank_of(matrices), DEVICE), IDS["of the first and the last"]
    x_PD = random_x(66, bank.width, DTYPES[0]).to(DEVICE)
    ways = (
        routed(ids_TK, {i: i for i in range(5)}),
        slot_tiles.route_all(ids_TK.to(DEVICE), torch.arange(5, device=DEVICE)),
    )
    found = [torch.full((70, ROWS), 7.0).to(DEVICE, DTYPES[0]) for _ in ways]
    for way, out in zip(ways, found, strict=True):
        slot_tiles.multiply(bank, x_PD, way, out)
    assert torch.equal(*found) and found[0][66:].eq(7).all()


def test_sorted_pairs_are_written_to_where_they_came_from() -> None:
    matrices = [matrix("ct4", seed) for seed in range(SLOTS)]
    bank, ids_TK = cases.on(bank_of(matrices), DEVICE), chosen(30, 5)
    pairs = routed(ids_TK, {i: i for i in range(5)})
    x_PD = random_x(60, bank.width, DTYPES[0])
    straight, back = (torch.full((60, ROWS), torch.nan).to(DEVICE, DTYPES[0]) for _ in range(2))
    slot_tiles.multiply(bank, x_PD.to(DEVICE), pairs, straight, per_token=1)
    order = pairs.order_P.long().cpu()
    slot_tiles.multiply(bank, x_PD[order].to(DEVICE), pairs, back)
    assert torch.equal(back.cpu()[order], straight.cpu())


def test_some_experts_alone_leave_the_pairs_of_others_as_they_are() -> None:
    matrices = [matrix("ct4", seed) for seed in range(SLOTS)]
    bank, ids_TK = cases.on(bank_of(matrices), DEVICE), chosen(30, 5)
    pairs = routed(ids_TK, {1: 4, 3: 2})
    found = torch.full((60, ROWS), torch.nan).to(DEVICE, DTYPES[0])
    slot_tiles.multiply(bank, random_x(60, bank.width, DTYPES[0]).to(DEVICE), pairs, found)
    theirs = torch.isin(ids_TK.flatten(), torch.tensor([1, 3]))
    assert not found.cpu()[theirs].isnan().any() and found.cpu()[~theirs].isnan().all()


def test_pairs_without_an_expert_are_no_launch() -> None:
    bank = cases.on(bank_of([matrix("ct4", 0)]), DEVICE)
    pairs = slot_tiles.route(torch.empty(0, dtype=torch.int64, device=DEVICE), [0, 0], [])
    x = torch.empty(0, bank.width, dtype=DTYPES[0], device=DEVICE)
    slot_tiles.multiply(bank, x, pairs, x.new_empty(0, ROWS))


def test_a_bank_whose_slots_are_no_multiples_of_words_is_not_served() -> None:
    bank = bank_of([matrix("Q4_0", seed) for seed in range(2)])
    raw = bank.parts["raw"]
    odd = torch.zeros(2 * raw[0].numel() + 9, dtype=torch.uint8, device=DEVICE)
    odd = odd.as_strided(raw.shape, (raw[0].numel() + 2, *raw.stride()[1:]))
    x = random_x(3, bank.width, DTYPES[0]).to(DEVICE)
    assert not slot_tiles.multiplies(replace(bank, parts={"raw": odd}), x)
