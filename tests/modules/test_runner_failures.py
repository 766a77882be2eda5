"""What goes wrong in a forward is said, and the next one is exact."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Net, Part, Streamed, streamed, unfinished
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import Boom
from support import FailingDisk, in_thread, rewrite_in_place
from torch import nn

from layer_streamer import CheckpointChangedError, ClosedError, ReadError, StreamerError
from layer_streamer.modules.blocks import find_stacks
from layer_streamer.modules.runner import Runner

OPTIONS: dict[str, dict[str, Any]] = {
    "slots": {},
    "mapped": {"n_cpu_pinned": None, "n_cpu": None, "read_mode": "mapped"},
    "resident": {"device_budget": "1GiB"},
}


@pytest.fixture(params=OPTIONS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path, **OPTIONS[request.param]) as some:
        yield some


@pytest.fixture
def pooled(tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path) as some:
        yield some


def boom() -> None:
    raise Boom


def run(some: Streamed) -> torch.Tensor:
    x = torch.ones(2, HIDDEN)
    with torch.no_grad():
        y: torch.Tensor = some.model(x)
        return y


def test_an_error_of_a_block_ends_the_pass_and_gives_the_slot_back(opened: Streamed) -> None:
    for number in (*range(NUM_BLOCKS), 0, 0):
        opened.model.blocks[number].act = boom
        with pytest.raises(Boom):
            run(opened)
        assert not unfinished(opened.streamer)
        opened.model.blocks[number].act = None
        opened.agree(number)


def test_strictly_weights_are_there_within_a_block_and_nowhere_else(tmp_path: Path) -> None:
    with streamed(tmp_path, strict=True) as some:
        blocks = some.model.blocks
        for act in (None, boom):
            seen: list[list[bool]] = []
            blocks[1].act = lambda s=seen: s.append([b.up.weight.is_meta for b in blocks])
            blocks[2].act = act
            with suppress(Boom):
                run(some)
            assert seen == [[True, False, *(NUM_BLOCKS - 2) * [True]]]
            assert all(block.up.weight.is_meta for block in blocks)
            with pytest.raises(StreamerError, match=r"blocks\.2\.up\.weight is used while"):
                blocks[2].up(torch.ones(2, HIDDEN))
        blocks[2].act = None
        some.agree()


def test_an_error_that_is_handled_beside_the_forward_is_none_of_the_forward(
    pooled: Streamed,
) -> None:
    passes: list[bool] = []
    pooled.model.blocks[3].act = lambda: passes.append(unfinished(pooled.streamer))
    try:
        boom()
    except Boom:
        pooled.agree()
    assert passes == [True]


@pytest.mark.parametrize("hook", ["forward_pre", "forward"])
def test_an_error_of_somebody_elses_hook_leaves_the_next_forward_exact(
    opened: Streamed, hook: str
) -> None:
    for number in range(NUM_BLOCKS):
        block = opened.model.blocks[number]
        handle = getattr(block, f"register_{hook}_hook")(lambda *args: boom())
        with pytest.raises(Boom):
            run(opened)
        handle.remove()
        opened.agree()


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["error", "early", "hook", "whole"]), st.integers(0, 6)),
        max_size=6,
    )
)
def test_after_any_course_of_failures_a_forward_is_exact(acts: list[tuple[str, int]]) -> None:
    some = SHARED[0]
    for n, (what, number) in enumerate(acts):
        block = some.model.blocks[number]
        block.act = boom if what == "error" else None
        handle = block.register_forward_hook(lambda *args: boom()) if what == "hook" else None
        some.model.way = range(number if what == "early" else NUM_BLOCKS)
        try:
            run(some)
        except Boom:
            assert what in ("error", "hook")
        if handle is not None:
            handle.remove()
        block.act = None
        if what == "whole":
            some.agree(n, way=range(NUM_BLOCKS))
    some.agree(way=range(NUM_BLOCKS))


SHARED: list[Streamed] = []


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with streamed(tmp_path_factory.mktemp("shared"), n_gpu=2) as some:
        SHARED.append(some)
        yield
        SHARED.clear()


@pytest.mark.parametrize("number", [0, 3, NUM_BLOCKS - 1])
def test_a_read_error_names_the_block_that_needs_the_layer(
    pooled: Streamed, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    spec = pooled.streamer.manifest.layers[number].tensors["up.weight"]
    disk = FailingDisk(spec.offset + spec.nbytes // 2, errno.EIO)
    monkeypatch.setattr(os, "preadv", disk)
    ran: list[int] = []
    for i, block in enumerate(pooled.model.blocks):
        block.act = lambda i=i: ran.append(i)
    disk.times = 1
    with pytest.raises(ReadError, match=rf"^blocks\.{number}: layer {number}, .*Input/output"):
        run(pooled)
    assert ran == list(range(number))
    pooled.agree()


def test_a_file_that_was_rewritten_is_an_error_of_the_forward(
    tmp_path: Path, pooled: Streamed
) -> None:
    pooled.agree()
    rewrite_in_place(tmp_path / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointChangedError):
            run(pooled)


@pytest.mark.parametrize("number", [0, 3, NUM_BLOCKS - 1])
def test_a_file_that_is_rewritten_during_a_forward_is_an_error_of_it(
    tmp_path: Path, opened: Streamed, number: int
) -> None:
    act = partial(rewrite_in_place, tmp_path / "model.safetensors")
    opened.model.blocks[number].act = act
    with pytest.raises(CheckpointChangedError):
        run(opened)


WRITES = {
    "in place": lambda p: p.add_(1),
    "detached": lambda p: p.detach().zero_(),
    "an element": lambda p: p.view(-1)[:1].fill_(7),
}


@pytest.mark.parametrize("leaf", ["up.weight", "scale"])
def test_a_write_to_a_bound_weight_names_the_block(opened: Streamed, leaf: str) -> None:
    for number, how in product((0, 2, NUM_BLOCKS - 1), WRITES):
        block = opened.model.blocks[number]
        block.act = partial(write, block, leaf, how)
        for _ in range(2):
            with pytest.raises(
                StreamerError, match=rf"^blocks\.{number}: layer {number}: .* writt"
            ):
                run(opened)
        block.act = None
        opened.agree()


def write(block: nn.Module, leaf: str, how: str) -> None:
    WRITES[how](block.state_dict(keep_vars=True)[leaf])


def test_a_write_to_a_repeated_last_block_is_an_error_of_the_next_forward(
    pooled: Streamed,
) -> None:
    last = NUM_BLOCKS - 1
    pooled.model.way = [*range(NUM_BLOCKS), last]
    run(pooled)
    block = pooled.model.blocks[last]
    block.act = lambda: WRITES["in place"](block.up.bias)
    run(pooled)
    block.act = None
    with pytest.raises(StreamerError, match=rf"^blocks\.{last}: layer {last}: .* written"):
        run(pooled)
    pooled.agree(way=pooled.model.way)


class Nested(Part):
    """A block that calls another one."""

    inner: list[nn.Module]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in getattr(self, "inner", []):
            x = module(x)
        return super().forward(x)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_block_within_a_block_is_one_clear_error(tmp_path: Path, number: int) -> None:
    with streamed(tmp_path, lambda: Net(make=Nested)) as some:
        some.model.blocks[2].inner = [some.model.blocks[number]] if number != 2 else []
        if number == 2:
            again = iter([some.model.blocks[2]])
            some.model.blocks[2].inner = again
        with pytest.raises(
            StreamerError, match=rf"blocks\.{number} is entered within the forward of blocks\.2"
        ):
            run(some)
        some.model.blocks[2].inner = []
        some.agree()


def test_a_block_that_is_bound_where_shapes_differ_is_named_and_ends_the_pass(
    tmp_path: Path,
) -> None:
    with streamed(tmp_path) as some:
        some.runner.close()
        blocks = find_stacks(some.model, ["blocks.{i}."])[0].blocks
        up = some.model.blocks[4].up
        up.weight, good = nn.Parameter(torch.empty(3, device="meta")), up.weight
        other = Runner(some.streamer, blocks)
        for _ in range(2):
            with pytest.raises(
                StreamerError, match=r"^blocks\.4\.up\.weight: expected shape \[3\]"
            ):
                run(some)
            assert not unfinished(some.streamer)
        other.close()
        up.weight = good
        Runner(some.streamer, blocks)
        some.agree()


def test_a_closed_runner_leaves_a_plain_model_on_meta(opened: Streamed) -> None:
    opened.agree()
    for _ in range(2):
        opened.runner.close()
    for block in opened.model.blocks:
        assert all(p.is_meta for p in block.parameters())
        assert not block._forward_hooks_always_called
        assert len(block._forward_pre_hooks) == 1  # the tests' own
    assert not opened.streamer.closed
    opened.stream_again()
    opened.agree()


@pytest.mark.parametrize("what", ["runner", "streamer"])
@pytest.mark.parametrize("where", ["here", "on another thread"])
def test_what_is_closed_in_the_midst_of_a_forward_is_a_closed_error(
    tmp_path: Path, what: str, where: str
) -> None:
    for number in (0, 3, NUM_BLOCKS - 1):
        with streamed(tmp_path) as some:
            close = getattr(some, what).close
            act = close if where == "here" else partial(in_thread, close)
            some.model.blocks[number].act = act
            with pytest.raises(ClosedError, match="closed"):
                run(some)
            some.runner.close()
            for block in some.model.blocks:
                assert all(p.is_meta for p in block.parameters())
                assert not block._forward_hooks_always_called


def test_after_the_streamer_was_closed_a_forward_is_a_closed_error(pooled: Streamed) -> None:
    pooled.streamer.close()
    for _ in range(2):
        with pytest.raises(ClosedError, match="the streamer is closed"):
            run(pooled)
