"""Experts that are read as they are asked for: by threads that stay, in bounded memory."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensor, write_safetensors
from mixtures import EXPERTS, LAYERS, LAYOUTS, Experts, alone, check, opened, stacked

from layer_streamer import ClosedError, ConfigError, ReadError
from layer_streamer.transport import files as files_module
from layer_streamer.transport import mapped as mapped_module
from layer_streamer.transport.fetcher import Fetcher

KINDS = ["cpu", "read"]
ALL = list(range(EXPERTS))


def fetch_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("layer-streamer-fetch")]


def large(directory: Path) -> Experts:
    """Layers that are larger than what reads pass through."""
    found, tensors = Experts(), dict[str, torch.Tensor]()
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.norm.weight"] = random_tensor((34,), seed=i)
        for e in range(EXPERTS):
            one = random_tensor((64, 130), seed=1 + len(found))
            found[i, e, "mlp.experts.up.weight"] = one
            tensors[f"model.layers.{i}.mlp.experts.{e}.up.weight"] = one
    write_safetensors(directory / "model.safetensors", tensors)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["cpu", "read", "mapped"])
def test_experts_are_read_past_the_page_cache_where_that_is_asked_for(
    tmp_path: Path, layout: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, dice = LAYOUTS[layout](tmp_path), random.Random(3)
    counted: list[int] = []
    usual = files_module.read_direct

    def count(descriptor: int, view: memoryview, *rest: Any) -> None:
        counted.append(len(view))
        usual(descriptor, view, *rest)

    with opened(tmp_path, kind, 5, read_mode="direct", read_chunk=4096) as streamer:
        tiers = streamer.plan.expert_tiers
        assert tiers is not None and (tiers.layers, tiers.read_mode) == ((), "direct")
        if "buffered" in streamer.read_modes.values():
            pytest.skip("this file system reads nothing directly")
        check(streamer, expected, [[]] * LAYERS)
        monkeypatch.setattr(files_module, "read_direct", count)
        for _ in range(5):
            check(streamer, expected, [dice.choices(ALL, k=4) for _ in range(LAYERS)])
        assert len(counted) > 20 and "direct" in str(streamer.plan)


@pytest.mark.parametrize("room", [0, 1, 2, LAYERS])
def test_host_memory_keeps_as_many_layers_experts_as_its_budget_has_room_for(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_module, "MERGE_GAP", 0)
    expected, dice = large(tmp_path), random.Random(room)
    with opened(tmp_path, "mapped", 6) as streamer:
        plan = streamer.plan
        assert plan.expert_tiers is not None and plan.expert_tiers.layers == (0, 1, 2)
        a_layer, placed = plan.expert_tiers.page_bytes // LAYERS, plan.placement.host_bytes
    threads = set(fetch_threads())
    staging = 2 * 2 * (4096 + 2 * 4096)
    budget = placed + staging + room * (a_layer + 2 * 4096)
    with opened(tmp_path, "mapped", 6, host_budget=budget, read_chunk=4096) as streamer:
        tiers = streamer.plan.expert_tiers
        assert tiers is not None and len(tiers.layers) == room
        assert (tiers.read_mode == "direct") == (room < LAYERS) == bool(tiers.disk_bytes)
        assert len(set(fetch_threads()) - threads) == (2 if room < LAYERS else 0)
        assert streamer.memory.host_bytes <= budget
        for _ in range(6):
            check(streamer, expected, [dice.choices(ALL, k=5) for _ in range(LAYERS)])
    assert set(fetch_threads()) == threads


def test_a_budget_that_reads_alone_are_more_than_is_refused(tmp_path: Path) -> None:
    alone(tmp_path)
    with opened(tmp_path, "mapped", 6) as streamer:
        placed = streamer.plan.placement.host_bytes
    with pytest.raises(ConfigError, match=r"host_budget=.*to read experts takes .* more"):
        opened(tmp_path, "mapped", 6, host_budget=placed + 4096, read_chunk=4096)


def test_where_page_locking_is_refused_all_is_read_and_the_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stacked(tmp_path)
    monkeypatch.setattr(mapped_module.MappedFiles, "pin", lambda *_: False)
    with opened(tmp_path, "mapped", 6) as streamer:
        check(streamer, expected, [[0, 5]] * LAYERS)
        tiers = streamer.plan.expert_tiers
        assert tiers is not None and not tiers.layers and tiers.disk_bytes
        assert "experts are read as they are asked for" in str(streamer.plan)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hint_that_cannot_be_read_is_an_error_only_where_it_is_asked_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stacked(tmp_path)
    with opened(tmp_path, kind, LAYERS * EXPERTS) as streamer:
        files = streamer._opened().pipeline.files
        whole = streamer.manifest.tensor("model.layers.1.mlp.experts.down_proj")
        usual, asked = type(files).read_into, [1]

        def fail(self: Any, path: Path, view: Any, offset: int, *rest: Any) -> None:
            if whole.offset < offset < whole.offset + whole.nbytes:
                raise ReadError(f"{path}: no")
            usual(self, path, view, offset, *rest)

        def step(x: Any, weights: Any, layer_idx: int) -> None:
            weights.experts.hint([3], layer=1)
            weights.experts.load(asked)

        with monkeypatch.context() as patched:
            patched.setattr(type(files), "read_into", fail)
            streamer.run_pass(0, lambda x, w, i: step(x, w, i) if i == 0 else None)
            asked = [3]
            with pytest.raises(ReadError, match=r"^layer 1, expert 3: tensor '.*down_proj': "):
                streamer.run_pass(0, step)
        check(streamer, expected, [[1, 3]] * LAYERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", range(4))
def test_an_interrupt_while_reads_are_handed_out_leaves_nothing_wrong(
    tmp_path: Path, kind: str, after: int
) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, kind, 5, read_threads=3) as streamer:
        home: Any = streamer._opened().experts._home  # type: ignore[union-attr]
        fetcher = home._fetcher
        queue, puts = fetcher._queue, []

        class Interrupted:
            def put(self, item: Any) -> None:
                if len(puts) == after:
                    raise KeyboardInterrupt
                puts.append(item)
                queue.put(item)

        check(streamer, expected, [[0, 1, 2]] * LAYERS)
        fetcher._queue = Interrupted()
        if after < 3:
            with pytest.raises(KeyboardInterrupt):
                check(streamer, expected, [[3, 4, 5, 6]] * LAYERS)
        fetcher._queue = queue
        for _ in range(2):
            check(streamer, expected, [[3, 4, 5], [0, 5], [1, 4]])


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_interrupt_while_a_load_waits_nothing_of_it_is_taken_to_be_there(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, kind, 5) as streamer:
        home: Any = streamer._opened().experts._home  # type: ignore[union-attr]
        usual = home.wait

        def interrupted() -> None:
            raise KeyboardInterrupt

        for asked in ([3, 4, 5], [0, 1, 2]):
            with monkeypatch.context() as patched:
                patched.setattr(home, "wait", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    check(streamer, expected, [asked] * LAYERS)
            assert home.wait == usual
            for _ in range(2):
                check(streamer, expected, [[3, 4, 5], [0, 5], [1, 4]])


@pytest.mark.parametrize("kind", KINDS)
def test_closing_during_a_load_waits_until_its_reads_have_ended(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked(tmp_path)
    streamer = opened(tmp_path, kind, 7, read_threads=2)
    device: Any = streamer._devices[0]
    files = streamer._opened().pipeline.files
    usual, began, goes_on = type(files).read_into, threading.Event(), threading.Event()
    raised, failed, stopped = list[BaseException](), list[BaseException](), threading.Event()
    stop = Fetcher.stop

    def say_stopped(self: Fetcher) -> None:
        stop(self)
        stopped.set()

    def slow(self: Any, *given: Any) -> None:
        began.set()
        assert goes_on.wait(100)
        try:
            usual(self, *given)
        except BaseException as error:
            failed.append(error)
            raise

    def load() -> None:
        try:
            streamer.run_pass(0, lambda x, w, i: w.experts.load(ALL))
        except BaseException as error:
            raised.append(error)

    monkeypatch.setattr(type(files), "read_into", slow)
    monkeypatch.setattr(Fetcher, "stop", say_stopped)
    loading, closing = threading.Thread(target=load), threading.Thread(target=streamer.close)
    loading.start()
    assert began.wait(100)
    closing.start()
    assert stopped.wait(100)
    goes_on.set()
    loading.join(100)
    closing.join(100)
    assert not failed and [type(error) for error in raised] == [ClosedError]
    assert streamer.closed and not getattr(device, "errors", []) and not fetch_threads()
