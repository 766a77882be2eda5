"""The kernels of decode attention against plain torch: run by test_llm_decode.py in a process.

With TRITON_INTERPRET=1 on the CPU, in Triton's interpreter; otherwise compiled, on a GPU.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from triton_runs import FEW

from layer_streamer.llm.kernels.decode_launching import (
    Look,
    launch_attention,
    launch_rotate_and_store,
)
from layer_streamer.llm.kernels.triton_support import interpreted
from layer_streamer.llm.models.rope import rotate
from layer_streamer.llm.passes.splits import block_of, fits_kernels, splits_of

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float16] if FEW else [torch.float32, torch.float16]
DTYPES += [] if interpreted() else [torch.bfloat16]
BLOCK = 16
"""Small, so that few positions are several blocks of several parts."""
OTHER = 3
"""Columns of ``blocks`` before those of the span that is looked at: those of another span."""


@dataclass
class Case:
    """Rows in one span: their lengths, the sizes of their regions, and the model's heads."""

    lengths: list[int]
    sizes: list[int]
    groups: int = 2
    sharing: int = 2
    width: int = 64
    window: int | None = None
    splits: int = 3


CASES = {
    "one token": Case([1], [64], groups=1, sharing=1),
    "lengths around a block and a part": Case([15, 16, 17, 48, 49, 100], [128] * 6, sharing=4),
    "more blocks than parts": Case([200], [256], splits=2),
    "one part": Case([40, 3], [64, 64], splits=1),
    "seven heads a key": Case([33, 5], [64, 32], groups=2, sharing=7, width=128),
    "a width of 80": Case([33, 5], [64, 32], groups=1, sharing=4, width=80),
    "a width of 24": Case([33, 5], [64, 32], sharing=1, width=24),
    "more heads a key than a tile's least": Case([20], [32], groups=1, sharing=20),
    "a window that has not been filled": Case([4, 11], [32, 32], window=11),
    "rings before and after they wrap": Case([32, 33, 50, 97], [32] * 4, window=11),
    "a window as large as its ring": Case([32, 33, 71], [32, 32, 48], window=32),
    "a window of one": Case([1, 40], [16, 16], window=1),
}


def blocks_of(case: Case, places: int) -> list[list[int]]:
    """The rows' blocks: scattered, and none of them the first."""
    dice = torch.Generator().manual_seed(7)
    order = (1 + torch.randperm(sum(case.sizes) // places, generator=dice)).tolist()
    return [[order.pop() for _ in range(size // places)] for size in case.sizes]


def look_of(case: Case, places: int = BLOCK) -> Look:
    count, blocks = len(case.lengths), blocks_of(case, places)
    numbers = torch.full((count, 3), 10_000)
    numbers[:, 0] = torch.tensor(case.lengths) - 1
    numbers[:, 1] = torch.arange(count).flip(0)  # lines in another order than tokens
    lines = torch.full((count, OTHER + 1 + max(map(len, blocks))), 10_000, dtype=torch.int32)
    for row, own in enumerate(blocks):
        line = [case.sizes[row], *own]
        lines[count - 1 - row, OTHER : OTHER + len(line)] = torch.tensor(line)
    heads = case.groups * case.sharing
    room = count * heads * case.splits
    return Look(
        numbers=numbers.to(DEVICE),
        blocks=lines.to(DEVICE),
        column=OTHER,
        places=places,
        window=case.window,
        splits=case.splits,
        block=BLOCK,
        # What an earlier pass left there is not to be seen.
        sums=torch.full((room * case.width,), float("nan"), device=DEVICE),
        stats=torch.full((room * 2,), float("nan"), device=DEVICE),
    )


def seen_places(case: Case, row: int, places: int = BLOCK) -> list[int]:
    """The places of what a row's new token sees, oldest first."""
    length, size, blocks = case.lengths[row], case.sizes[row], blocks_of(case, places)[row]
    at = [position % size for position in range(max(0, length - (case.window or length)), length)]
    return [blocks[place // places] * places + place % places for place in at]


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def poisoned_memory(case: Case, dtype: torch.dtype, places: int = BLOCK) -> torch.Tensor:
    """Keys and values of what rows see, and NaN everywhere else."""
    count = places + sum(case.sizes)
    memory = random(count, 2, case.groups, case.width, dtype=dtype, seed=1)
    unseen = torch.ones(count, dtype=torch.bool)
    for row in range(len(case.lengths)):
        unseen[seen_places(case, row, places)] = False
    memory[unseen.to(DEVICE)] = float("nan")
    return memory


def expected_mix(
    case: Case, q: torch.Tensor, memory: torch.Tensor, scale: float, places: int = BLOCK
) -> torch.Tensor:
    """Textbook attention, (rows, heads, width), in float64."""
    mixed = []
    for row in range(len(case.lengths)):
        both = memory[seen_places(case, row, places)].double()
        keys, values = (
            x.repeat_interleave(case.sharing, 1).transpose(0, 1) for x in both.unbind(1)
        )
        scores = torch.einsum("he,hpe->hp", q[row].double(), keys) * scale
        mixed.append(torch.einsum("hp,hpe->he", scores.softmax(-1), values))
    return torch.stack(mixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_see_their_own_positions_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    memory, scale = poisoned_memory(case, dtype), case.width**-0.5
    q = random(len(case.lengths), case.groups * case.sharing, case.width, dtype=dtype, seed=2)
    found = launch_attention(q, memory, look_of(case), scale)
    assert found.dtype == dtype and found.shape == q.shape
    expected = expected_mix(case, q, memory, scale)
    # Weights are rounded to the values' dtype before they are multiplied, sums are float32.
    bound = max(4 * torch.finfo(dtype).eps, 1e-5) * float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("sink", [3.0] if FEW else [-1e4, 0.0, 3.0, 1e4])
@pytest.mark.parametrize("name", ["more blocks than parts", "rings before and after they wrap"])
def test_a_head_with_a_sink_gives_less_of_its_positions(name: str, sink: float) -> None:
    case = CASES[name]
    memory, heads = poisoned_memory(case, torch.float32), case.groups * case.sharing
    q = random(len(case.lengths), heads, case.width, dtype=torch.float32, seed=2)
    sinks = torch.full((heads,), -0.5, device=DEVICE)
    sinks[1] = sink
    look = look_of(case)
    found = launch_attention(q, memory, look, 0.3, sinks)
    expected = expected_mix(case, q, memory, 0.3)
    for row in range(len(q)):
        keys = memory[seen_places(case, row), 0].double().repeat_interleave(case.sharing, 1)
        total = torch.einsum("he,phe->hp", q[row].double(), keys).mul(0.3).logsumexp(-1)
        expected[row] *= torch.sigmoid(total - sinks.double())[:, None]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [2] if FEW else [1, 2])
def test_the_same_numbers_give_the_same_bits_and_other_rows_change_none(blocks: int) -> None:
    case = CASES["lengths around a block and a part"]
    memory = poisoned_memory(case, torch.float16, 32)
    q = random(6, 8, case.width, dtype=torch.float16, seed=3)
    look = replace(look_of(case, 32), block=16 * blocks)
    first = launch_attention(q, memory, look, 0.3)
    assert torch.equal(launch_attention(q, memory, look, 0.3), first)
    for row in range(6):
        alone = replace(look, numbers=look.numbers[row : row + 1])
        assert torch.equal(launch_attention(q[row : row + 1], memory, alone, 0.3)[0], first[row])


def test_scores_of_any_size_give_weights_that_are_finite() -> None:
    case = CASES["more blocks than parts"]
    memory = poisoned_memory(case, torch.float32)
    q = random(1, 4, case.width, dtype=torch.float32, seed=4)
    found = launch_attention(q, memory, look_of(case), 1e4)
    torch.testing.assert_close(
        found.double(), expected_mix(case, q, memory, 1e4), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["seven heads a key", "a width of 80", "a width of 24", "rings before and after they wrap"],
)
def test_queries_are_turned_and_keys_and_values_stored_at_their_places(
    name: str, dtype: torch.dtype, interleaved: bool
) -> None:
    case = CASES[name]
    tokens, heads = len(case.lengths), case.groups * case.sharing
    # As they come out of one product: a token's heads side by side, and more beside them.
    q, k, v = (
        random(tokens, count + 1, case.width, dtype=dtype, seed=i).transpose(0, 1)[:count]
        for i, count in enumerate((heads, case.groups, case.groups))
    )
    angles = random(tokens, case.width // 2, dtype=torch.float32, seed=9)
    table = torch.stack((angles.cos(), angles.sin()))
    memory = random(BLOCK + sum(case.sizes), 2, case.groups, case.width, dtype=dtype, seed=5)
    expected = memory.clone()
    turned = [rotate(x, table, interleaved=interleaved).transpose(0, 1) for x in (q, k)]
    for row in range(tokens):
        place = seen_places(case, row)[-1]
        expected[place, 0], expected[place, 1] = turned[1][row], v[:, row]
    found = launch_rotate_and_store(
        (q, k, v), table, memory, look_of(case), interleaved=interleaved
    )
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(found, turned[0], **close)
    torch.testing.assert_close(memory, expected, **close)
    same = memory == expected
    same[[seen_places(case, row)[-1] for row in range(tokens)], 0] = True
    assert same.all(), "values are copied, and nothing else is touched"


@pytest.mark.skipif(interpreted(), reason="takes minutes there")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4095, 4096, 20_000])
def test_blocks_of_the_engine_over_many_positions(
    length: int, width: int, dtype: torch.dtype
) -> None:
    block = block_of(width, dtype)
    size = -(-length // 256) * 256
    case = Case([length, 1 + length // 3], [size, size], groups=4, sharing=7, width=width)
    case.splits = splits_of(size, block)
    look = replace(look_of(case, 256), block=block)
    memory, q = poisoned_memory(case, dtype, 256), random(2, 28, width, dtype=dtype, seed=6)
    found = launch_attention(q, memory, look, width**-0.5)
    expected = expected_mix(case, q, memory, width**-0.5, 256)
    bound = max(4 * torch.finfo(dtype).eps, 1e-5) * float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= bound


def test_heads_that_registers_cannot_hold_are_not_served() -> None:
    assert fits_kernels(28, 4, 128) and fits_kernels(64, 1, 256) and fits_kernels(8, 8, 24)
    assert not fits_kernels(65, 1, 128) and not fits_kernels(8, 8, 320)
