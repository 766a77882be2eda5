"""A model's own forward over a sweep: bit for bit the resident one, whatever order it takes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Net, Part, Streamed, streamed, unfinished
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupter import LIBRARY
from routes import default_params, make_devices
from torch import nn

from layer_streamer import ConfigError, StreamerError, SupersededError
from layer_streamer.modules.blocks import find_stacks
from layer_streamer.modules.runner import Runner

LAST = NUM_BLOCKS - 1
WAYS = {
    "in order": range(NUM_BLOCKS),
    "each twice": [i for i in range(NUM_BLOCKS) for _ in range(2)],
    "the last one three times": [*range(NUM_BLOCKS), LAST, LAST],
    "every second": range(0, NUM_BLOCKS, 2),
    "left early": range(3),
    "the last alone": [LAST],
    "from the middle": range(2, NUM_BLOCKS),
    "backwards": range(LAST, -1, -1),
    "shared": [0, 1, 0, 1, 2, 3, 2, 3],
}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path) as some:
        yield some


class Swept:
    """Counts what a runner takes of its streamer."""

    def __init__(self, some: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[int]] = []
        self._sweep = some.streamer.sweep
        monkeypatch.setattr(some.streamer, "sweep", self.sweep)

    def sweep(self, **way: bool) -> Any:
        seen: list[int] = []
        self.passes.append(seen)

        def generate() -> Iterator[Any]:
            for index, weights in self._sweep(**way):
                seen.append(index)
                yield index, weights

        return generate()


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_is_exact_whatever_order_it_takes(opened: Streamed, way: str) -> None:
    for seed in range(3):
        opened.agree(seed, way=WAYS[way])
    opened.agree(way=range(NUM_BLOCKS))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, LAST), max_size=8), min_size=1, max_size=3))
def test_forwards_of_any_order_one_after_the_other_are_exact(ways: list[list[int]]) -> None:
    for n, way in enumerate(ways):
        SHARED[0].agree(n, way=way)


SHARED: list[Streamed] = []


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with streamed(tmp_path_factory.mktemp("shared"), n_gpu=2) as some:
        SHARED.append(some)
        yield
        SHARED.clear()


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.booleans(), min_size=NUM_BLOCKS, max_size=NUM_BLOCKS), min_size=1, max_size=3
    )
)
def test_forwards_that_skip_any_blocks_are_exact(skips: list[list[bool]]) -> None:
    for n, some in enumerate(skips):
        SHARED[0].agree(n, way=[i for i, skipped in enumerate(some) if not skipped])


@pytest.mark.parametrize("route", default_params())
def test_a_forward_is_exact_on_every_route(tmp_path: Path, route: str) -> None:
    with streamed(tmp_path, route=route, device=make_devices(route)) as some:
        for seed in range(3):
            some.agree(seed)
        some.agree(way=[0, 0, 3, 3])
        some.agree(way=range(NUM_BLOCKS))


def test_a_pass_goes_once_over_the_layers_and_ends_with_the_last_block(
    opened: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = Swept(opened, monkeypatch)
    for n in range(3):
        opened.agree(n)
        assert not unfinished(opened.streamer)
    assert swept.passes == 3 * [list(range(NUM_BLOCKS))]
    report = opened.streamer.last_pass
    assert report is not None


def test_the_last_layer_is_given_back_before_what_follows_the_blocks(opened: Streamed) -> None:
    seen: list[bool] = []
    opened.model.head.register_forward_pre_hook(
        lambda module, args: seen.append(unfinished(opened.streamer))
    )
    opened.model.blocks[2].act = lambda: seen.append(unfinished(opened.streamer))
    opened.agree()
    assert seen == [True, False]


def test_a_block_that_is_repeated_takes_its_layer_once(
    opened: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = Swept(opened, monkeypatch)
    for n in range(3):
        opened.agree(n, way=WAYS["each twice"])
    assert swept.passes == 3 * [list(range(NUM_BLOCKS))]


def test_that_the_last_block_is_repeated_costs_one_pass_once(
    opened: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = Swept(opened, monkeypatch)
    for n in range(4):
        opened.agree(n, way=WAYS["the last one three times"])
    assert swept.passes == 5 * [list(range(NUM_BLOCKS))]


def test_when_repetition_ends_the_last_layer_is_given_back_at_once_again(opened: Streamed) -> None:
    seen: list[bool] = []
    opened.model.head.register_forward_pre_hook(
        lambda module, args: seen.append(unfinished(opened.streamer))
    )
    for way in ("each twice", "in order", "in order", "in order"):
        opened.agree(way=WAYS[way])
    assert seen == [True, True, False, False]


def test_skipped_layers_are_taken_and_given_back_in_the_one_pass(
    opened: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = Swept(opened, monkeypatch)
    for n in range(3):
        opened.agree(n, way=[0, 3, LAST])
    assert swept.passes == 3 * [list(range(NUM_BLOCKS))]


def test_a_step_cache_that_only_looks_at_the_first_block_keeps_it(
    opened: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = Swept(opened, monkeypatch)
    for way in ([0], [0], range(NUM_BLOCKS), [0], [0], range(NUM_BLOCKS)):
        opened.agree(way=way)
    assert swept.passes == 2 * [list(range(NUM_BLOCKS))]


def test_the_order_of_a_forward_is_found_out_and_makes_one_pass_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = [2, 0, 3, 1, 1, 4, 6, 5]
    with streamed(tmp_path) as some:
        assert some.runner.order is None
        for some_way in (way, range(NUM_BLOCKS)):
            some.agree(way=some_way)
            assert some.runner.order == (2, 0, 3, 1, 4, 6, 5)
        for partial in ([0, 1], [0, 1, 1, 0, 2, 3, 4, 5, 6]):
            some.stream_again()
            for some_way in (partial, way, way):
                some.agree(way=some_way)
                assert some.runner.order is None
        some.stream_again()
        some.agree(way=way)
    with streamed(tmp_path, layers=some.runner.order) as ordered:
        swept = Swept(ordered, monkeypatch)
        for seed in range(3):
            ordered.agree(seed, way=way)
        assert swept.passes == 3 * [[2, 0, 3, 1, 4, 6, 5]]
        ordered.agree(way=range(NUM_BLOCKS))
        ordered.model.blocks[3].act = lambda: ordered.model.blocks[3].up.bias.add_(1)
        with pytest.raises(StreamerError, match=r"^blocks\.3: layer 3: "):
            ordered.agree()


@settings(max_examples=10)
@given(st.permutations(range(3)), st.lists(st.integers(0, 2), max_size=8))
def test_any_order_of_the_layers_is_exact_for_any_forward(order: list[int], way: list[int]) -> None:
    with TemporaryDirectory() as path, streamed(Path(path), lambda: Net(3), layers=order) as some:
        for seed in range(2):
            some.agree(seed, way=way)


def test_one_block_alone_streams(tmp_path: Path) -> None:
    with streamed(tmp_path, lambda: Net(1)) as some:
        for way in ([0], [0], [0, 0], [], [0]):
            some.agree(way=way)


class Wide(Part):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.more(super().forward(x))
        return y


def test_blocks_that_differ_are_one_sequence(tmp_path: Path) -> None:
    def make() -> Net:
        kinds = iter([Part, Wide, Part, Wide, Wide, Part, Part])

        def one() -> nn.Module:
            return next(kinds)()

        return Net(make=one)

    with streamed(tmp_path, make) as some:
        for seed in range(3):
            some.agree(seed)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_is_exact_in_every_mode_of_gradients(opened: Streamed, mode: str) -> None:
    x = torch.ones(2, HIDDEN)
    for _ in range(3):
        with MODES[mode]():
            assert torch.equal(opened.model(x), opened.resident(x))
    opened.agree()


def test_what_is_resident_on_the_device_is_at_the_same_address_in_every_pass(
    tmp_path: Path,
) -> None:
    with streamed(tmp_path, device_budget="1GiB") as some:
        seen = []
        for seed in range(3):
            some.agree(seed)
            seen.append([id(p) for p in some.model.blocks.parameters()])
        assert seen[0] == seen[1] == seen[2]


def test_hooks_of_others_see_the_weights_before_and_after_a_blocks_forward(
    opened: Streamed,
) -> None:
    seen: list[bool] = []
    for block in opened.model.blocks:
        block.register_forward_pre_hook(lambda m, args: seen.append(m.up.weight.is_meta))
        block.register_forward_hook(lambda m, args, out: seen.append(m.up.weight.is_meta))
    opened.stream_again()  # its hooks are younger, and come first all the same
    opened.agree()
    assert seen == 2 * NUM_BLOCKS * [False]


def test_layers_that_are_cast_on_their_way_are_exact(tmp_path: Path) -> None:
    with streamed(tmp_path, dtype=torch.bfloat16) as some:
        some.runner.close()
        for part in (some.model, some.resident):
            part.to(torch.bfloat16)
        some.stream_again()
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16)
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(some.model(x), some.resident(x))
            assert all(p.dtype == torch.bfloat16 for p in some.model.parameters())


def test_forwards_leave_no_more_objects_than_there_were(opened: Streamed) -> None:
    only = (tracemalloc.Filter(True, f"{LIBRARY}/modules/*"),)

    def count() -> int:
        gc.collect()
        traces = tracemalloc.take_snapshot().filter_traces(only)
        return sum(stat.count for stat in traces.statistics("filename"))

    ways = [WAYS["in order"], WAYS["each twice"], WAYS["left early"]]
    tracemalloc.start()
    try:
        for n in range(24):
            if n == 12:
                before = count()
            opened.agree(way=ways[n % 3])
        assert count() - before < 6
    finally:
        tracemalloc.stop()


def test_interleaved_passes_of_two_models_are_exact(tmp_path: Path) -> None:
    with streamed(tmp_path / "one") as one, streamed(tmp_path / "two") as two:
        x, y = torch.ones(2, HIDDEN), torch.zeros(2, HIDDEN)
        with torch.no_grad():
            for pair in zip(one.model.blocks, two.model.blocks, strict=True):
                x, y = (block(z) for block, z in zip(pair, (x, y), strict=True))
            for block in one.resident.blocks:  # type: ignore[union-attr]
                assert x.shape == block(x).shape
        one.agree()
        two.agree()


def by_steps(some: Streamed, seed: int) -> Iterator[torch.Tensor]:
    """Block after block, as somebody may who shows what each gives."""
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(seed))
    y = x
    for mine, plain in zip(some.model.blocks, some.resident.blocks, strict=True):  # type: ignore
        with torch.no_grad():
            x, y = mine(x), plain(y)
        assert torch.equal(x, y)
        yield x


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2), max_size=20))
def test_interleaved_walks_over_one_model_are_exact_wherever_they_are_left(
    order: list[int],
) -> None:
    walks = [by_steps(SHARED[0], seed) for seed in range(3)]
    for n in order:
        next(walks[n], None)
    SHARED[0].agree()


def test_layers_and_blocks_that_do_not_fit_together_are_refused(opened: Streamed) -> None:
    blocks = find_stacks(opened.model, ["blocks.{i}."])[0].blocks
    with pytest.raises(ConfigError, match="6 blocks, 7 layers"):
        Runner(opened.streamer, blocks[:-1])
    opened.agree()


def test_a_sweep_of_ones_own_beside_a_forward_supersedes_it(opened: Streamed) -> None:
    other = []
    opened.model.blocks[2].act = lambda: other.append(next(opened.streamer.sweep()))
    with pytest.raises(SupersededError):
        opened.agree()
    opened.model.blocks[2].act = None
    opened.agree()
