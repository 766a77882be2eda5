"""A backward over streamed blocks: the gradients of the resident model, or one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Net, Part, Streamed, finish, streamed, unfinished
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import default_params, make_devices
from torch.utils.checkpoint import checkpoint

from layer_streamer import StreamerError

KINDS = ["around the call", "around the call, reentrant", "within", "within, reentrant"]
"""Where activations are checkpointed; hooks of blocks run again if it is around their calls."""


class Inner(Part):
    """As transformers 5.23 does it: within the call, so that no hook of the block runs again."""

    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        y: torch.Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return y


class Checkpointed(Net):
    """Each block's activations are."""

    def __init__(self, kind: str = KINDS[0], count: int = NUM_BLOCKS) -> None:
        within = kind.startswith("within")
        super().__init__(count, Inner if within else Part)
        self.reentrant = kind.endswith("reentrant")
        self.around = not within
        for block in self.blocks:
            block.reentrant = self.reentrant  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        around = self.around and torch.is_grad_enabled()  # torch warns of others
        for i in self.way:
            block = self.blocks[i]
            x = checkpoint(block, x, use_reentrant=self.reentrant) if around else block(x)
        y: torch.Tensor = self.head(x)
        return y


def gradient(model: Any, seed: int) -> torch.Tensor:
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    return x.grad


def agree(some: Streamed, seeds: Any = range(3), way: Any = range(NUM_BLOCKS)) -> None:
    for model in (some.model, some.resident):
        model.way = tuple(way)
    for seed in seeds:
        assert torch.equal(gradient(some.model, seed), gradient(some.resident, seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", default_params("cpu pools", "cpu mapped", "pools", "cpu two"))
def test_gradients_of_checkpointed_blocks_are_those_of_the_resident_model(
    tmp_path: Path, kind: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_devices(route)
    with streamed(tmp_path, lambda: Checkpointed(kind), route=route, device=device) as some:
        bind = some.runner.binder.bind

        def bind_and_wait(*args: Any) -> None:
            bind(*args)
            finish(device)

        monkeypatch.setattr(some.runner.binder, "bind", bind_and_wait)
        agree(some)
        some.agree(way=range(NUM_BLOCKS))
        agree(some, [1])


WAYS = {
    "each twice": [i for i in range(NUM_BLOCKS) for _ in range(2)],
    "twice over": [*range(NUM_BLOCKS), *range(NUM_BLOCKS)],
    "every second": range(0, NUM_BLOCKS, 2),
    "left early": range(3),
    "the last alone": [NUM_BLOCKS - 1],
    "backwards": range(NUM_BLOCKS - 1, -1, -1),
    "the last three times": [*range(NUM_BLOCKS), NUM_BLOCKS - 1, NUM_BLOCKS - 1],
}


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_exact_whatever_order_a_forward_takes(
    tmp_path: Path, way: str, kind: str
) -> None:
    with streamed(tmp_path, lambda: Checkpointed(kind)) as some:
        agree(some, way=WAYS[way])
        agree(some)


SHARED: list[Streamed] = []


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with streamed(tmp_path_factory.mktemp("shared"), Checkpointed, n_gpu=1) as some:
        SHARED.append(some)
        yield
        SHARED.clear()


Move = st.sampled_from(["forward", "no grad", "backward", "partial"])


@settings(max_examples=25)
@given(st.lists(Move, max_size=8))
def test_forwards_and_backwards_in_any_order_are_exact(moves: list[str]) -> None:
    (some,) = SHARED
    graphs: list[tuple[Any, ...]] = []
    for number, move in enumerate(moves):
        for model in (some.model, some.resident):
            model.way = range(3 if move == "partial" else NUM_BLOCKS)
        if move == "no grad":
            some.agree(number)
        elif move == "backward" and graphs:
            (x, y), (u, v) = graphs.pop()
            y.sum().backward()
            v.sum().backward()
            assert torch.equal(x.grad, u.grad)
        elif move != "backward":
            inputs = [torch.full((2, HIDDEN), number / 9, requires_grad=True) for _ in range(2)]
            models = (some.model, some.resident)
            graphs.append(tuple((x, m(x)) for x, m in zip(inputs, models, strict=True)))
    agree(some, [1])


class Passes:
    """Notes the passes that a runner takes, and which steps of each bring something."""

    def __init__(self, some: Streamed, patch: pytest.MonkeyPatch) -> None:
        self.ways: list[dict[str, bool]] = []
        sweep = some.streamer.sweep

        def noted(*, on_host: bool, **way: bool) -> Any:
            assert not on_host
            self.ways.append(way)
            return sweep(on_host=on_host, **way)

        patch.setattr(some.streamer, "sweep", noted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_two_passes_and_a_turn_is_expected_after_the_first(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, back = {"turns": True}, {"back": True, "turns": True}
    with streamed(tmp_path, lambda: Checkpointed(kind), n_gpu=1, n_cpu=0) as some:
        some.model.train()
        passes = Passes(some, monkeypatch)
        agree(some, range(4))
        assert passes.ways == [{"turns": False}, back, *3 * [ahead, back]]
        report = some.streamer.last_pass
        assert report is not None
        assert len(report.steps["read"].spans) < NUM_BLOCKS
        passes.ways.clear()
        some.model.eval()
        for _ in range(2):
            some.agree()
        assert passes.ways == 2 * [{"turns": False}]


def test_forwards_without_a_backward_are_soon_taken_for_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamed(tmp_path, Checkpointed) as some:
        agree(some, [1])
        passes = Passes(some, monkeypatch)
        x = torch.ones(2, HIDDEN, requires_grad=True)
        for _ in range(4):
            some.model(x)
        assert [way["turns"] for way in passes.ways] == [True, True, False, False]
        agree(some)


def test_a_block_that_is_not_checkpointed_is_one_clear_line_in_the_backward(tmp_path: Path) -> None:
    with streamed(tmp_path) as some:
        x = torch.ones(2, HIDDEN, requires_grad=True)
        for _ in range(2):
            y = some.model(x)
            with pytest.raises(
                StreamerError, match=r"^blocks\.6: a backward needs its weights, .*checkpointing on"
            ):
                y.sum().backward()
            some.agree()


class Adding(Part):
    """Its backward needs none of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + self.up.bias[:HIDDEN]


def test_a_checkpoint_around_several_blocks_is_an_error(tmp_path: Path) -> None:
    def both(blocks: Any, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = block(x)
        return x

    with streamed(tmp_path) as some:
        for _ in range(2):
            x = torch.ones(2, HIDDEN, requires_grad=True)
            y = x
            for i in range(0, NUM_BLOCKS - 1, 2):
                y = checkpoint(both, some.model.blocks[i : i + 2], y, use_reentrant=False)
            with pytest.raises(StreamerError, match="shares a checkpoint with other blocks"):
                y.sum().backward()
            some.agree()
            y = torch.utils.checkpoint.checkpoint(
                both, some.model.blocks[:2], x, use_reentrant=True
            )
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
            some.agree()


def test_what_needs_no_weights_in_its_backward_needs_no_checkpoint(tmp_path: Path) -> None:
    with streamed(tmp_path, lambda: Net(make=Adding)) as some:
        agree(some)


def test_where_weights_stay_no_checkpoint_is_needed(tmp_path: Path) -> None:
    with streamed(tmp_path, device_budget="1GiB") as some:
        agree(some)


class WritesBetween(Checkpointed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
            x += 1
        y: torch.Tensor = self.head(x)
        return y


def test_others_may_write_to_what_blocks_give(tmp_path: Path) -> None:
    with streamed(tmp_path, WritesBetween) as some:
        agree(some)


class InDict(Part):
    """Gives more than tensors, in more than tuples."""

    def forward(self, x: Any) -> Any:
        return {"x": [super().forward(x)], "n": 3}


class OfDicts(Net):
    def __init__(self) -> None:
        super().__init__(make=InDict)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)["x"][0]
        y: torch.Tensor = self.head(x)
        return y


def test_outputs_may_be_in_dicts_and_lists(tmp_path: Path) -> None:
    with streamed(tmp_path, OfDicts) as some:
        agree(some)


class HandsOn(Part):
    """Hands on what the first block has made, as T5's do with their bias of positions."""

    def forward(self, x: Any) -> Any:
        x, bias = x
        y = super().forward(x)
        bias = torch.tanh(y * 3).mean(0) if bias is None else bias
        return y + bias, bias


class OfBiases(Net):
    def __init__(self) -> None:
        super().__init__(make=HandsOn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = (x, None)
        for block in self.blocks:
            state = checkpoint(block, state, use_reentrant=False)
        y: torch.Tensor = self.head(state[0])
        return y


def test_what_blocks_are_given_and_give_on_is_none_of_their_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamed(tmp_path, OfBiases, n_gpu=0, n_cpu=0) as some:
        passes = Passes(some, monkeypatch)
        agree(some)
        assert len(passes.ways) == 2 * 3


def test_weights_that_are_to_be_trained_are_refused_by_name(tmp_path: Path) -> None:
    with streamed(tmp_path, Checkpointed) as some:
        wanted = some.model.blocks[2].down.weight
        wanted.requires_grad_(True)
        with pytest.raises(StreamerError, match=r"^blocks\.2\.down\.weight: .*cannot be trained"):
            gradient(some.model, 1)
        some.agree()  # without gradients it is nobody's matter
        wanted.requires_grad_(False)
        agree(some)


def test_a_backward_within_a_blocks_forward_is_refused(tmp_path: Path) -> None:
    with streamed(tmp_path, Checkpointed) as some:
        y = some.model(torch.ones(2, HIDDEN, requires_grad=True)).sum()
        some.model.blocks[3].act = y.backward
        with pytest.raises(StreamerError, match=r"blocks\.6 is entered within .* blocks\.3"):
            some.agree()
        some.model.blocks[3].act = None
        agree(some)


def test_a_backward_beside_a_forward_that_is_under_way_is_exact_and_so_is_the_rest_of_it(
    tmp_path: Path,
) -> None:
    with streamed(tmp_path, Checkpointed) as some:
        grads = []
        for model in (some.model, some.resident):
            x = torch.ones(2, HIDDEN, requires_grad=True)
            y = checkpoint(model.blocks[0], x, use_reentrant=False)  # type: ignore[index, union-attr]
            z = checkpoint(model.blocks[1], y, use_reentrant=False)  # type: ignore[index, union-attr]
            z.sum().backward()
            with torch.no_grad():
                for i in range(2, NUM_BLOCKS):
                    z = model.blocks[i](z)  # type: ignore[index, union-attr]
            grads.append((x.grad, z))
        (mine, end), (plain, other) = grads
        assert torch.equal(mine, plain) and torch.equal(end, other)  # type: ignore[arg-type]


def test_layers_of_another_order_come_back_in_it(tmp_path: Path) -> None:
    way = [2, 0, 3, 1, 4, 6, 5]
    with streamed(tmp_path, Checkpointed, layers=way) as some:
        agree(some, way=way)


def test_after_a_backward_no_block_has_weights_and_nothing_is_handed_out(tmp_path: Path) -> None:
    with streamed(tmp_path, Checkpointed) as some:
        agree(some)
        assert not unfinished(some.streamer)
        assert all(p.is_meta for block in some.model.blocks for p in block.parameters())


def test_strictly_gradients_are_exact_as_well(tmp_path: Path) -> None:
    with streamed(tmp_path, lambda: Checkpointed(KINDS[1]), strict=True) as some:
        agree(some)
