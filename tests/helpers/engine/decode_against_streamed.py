"""Passes of ``llm.passes.decode`` against those of the streamer: run by test_llm_decode.py.

With TRITON_INTERPRET=1 on the CPU, where kernels are interpreted and nothing is captured; otherwise
on a GPU, where every such pass is captured and replayed.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint
from fake_device import NearDevice, near_device, opened_as
from gguf_models import file_config, write_gguf
from triton_runs import FEW, of_many
from zoo import DENSE, IDS, zoo_model

from layer_streamer import LayerStreamer
from layer_streamer.devices.accelerator import CudaDevice
from layer_streamer.llm.drafts.own_weights import own_weights, round_layers
from layer_streamer.llm.kernels.triton_support import interpreted
from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.passes.second_look import why_not_finite
from layer_streamer.llm.text.sampling import Sampler, choose_tokens

DEVICE = "cpu" if interpreted() else "cuda"
TOLERANCE = 1e-5
NAMES = ["qwen2-window", "gemma3_text"] if FEW else DENSE
PROMPTS = (23, 50)


STREAMS: dict[str, dict[str, Any]] = {
    "everything": {"device_budget": None, "n_gpu": 1, "host_layers": (0, 1, 2)},
    "some layers": {"device_budget": "460KiB", "n_gpu": 0, "n_cpu_pinned": 1},
    "all layers": {"device_budget": None, "n_gpu": 2},
    "keys and values of one layer": {"host_layers": (1,)},
}
"""By what streams, how it is opened."""


@contextmanager
def opened(
    path: Path, config: Any, *, rows: int, part: int = 0, **options: Any
) -> Iterator[Runner]:
    """A runner of which nothing streams, unless ``options`` say so, with passes of up to ``rows``
    rows captured, and prompts beside them in parts."""
    given = {"device": DEVICE, "tokens": 512, "max_rows": 2, "device_budget": "1GiB"} | options
    chunking = Chunking(tokens=64, group_rows=True, captured_rows=rows, captured_part=part)
    with open_runner(path, config, chunking=chunking, **given) as runner:
        assert set(runner.streamer.plan.tiers) == {"device"} or "device_budget" in options
        yield runner


def decode(runner: Runner, prompts: list[list[int]], count: int) -> tuple[torch.Tensor, int]:
    """Logits of prompts, then of ``count`` tokens of each; passes that went by the decoder."""
    rows = [runner.kv.rows.add(len(ids) + count) for ids in prompts]
    found = [runner.forward(list(zip(rows, prompts, strict=True)))]
    for i in range(count):
        found.append(runner.forward([(row, [IDS[i + k]]) for k, row in enumerate(rows)]))
    return torch.cat(found).cpu(), passes(runner)


def passes(runner: Runner) -> int:
    return 0 if runner.decoder is None else runner.decoder.passes


def both(path: Path, config: Any, count: int = 2, **options: Any) -> list[tuple[Any, int]]:
    """The same, streamed and captured."""
    prompts, found = [IDS[k : k + n] for k, n in enumerate(PROMPTS)], []
    for rows in (0, 2):
        with opened(path, config, rows=rows, **options) as runner:
            found.append(decode(runner, prompts, count))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_gives_the_logits_of_streamed_passes(tmp_path: Path, name: str) -> None:
    model = zoo_model(name)
    config = model_config(model.config)
    (expected, none), (found, all_of_them) = both(tiny_checkpoint(tmp_path, model), config)
    assert (none, all_of_them) == (0, 2)
    assert relative_error(found, expected) <= TOLERANCE


@of_many
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_packed_weights_with_permuted_heads_give_the_logits_of_streamed_passes(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, zoo_model(name))
    (expected, _), (found, captured) = both(path, file_config(path))
    assert captured == 2 and relative_error(found, expected) <= TOLERANCE


@of_many
def test_a_ring_is_written_around_its_end(tmp_path: Path) -> None:
    model = zoo_model("mistral", max_position_embeddings=2048)
    path, config, found = tiny_checkpoint(tmp_path, model), model_config(model.config), []
    for rows in (0, 1):
        with opened(path, config, rows=rows, tokens=1024, max_rows=1) as runner:
            assert runner.kv.span(0).ring == 512
            found.append(decode(runner, [(IDS * 20)[:508]], 8)[0])
    assert relative_error(found[1], found[0]) <= TOLERANCE


def history(runner: Runner, seed: int, count: int, *, ordered: bool = False) -> list[torch.Tensor]:
    """Passes over rows that come with prompts, go, and come back to others' places. ``ordered``:
    rows that decode come first."""
    rng, rows, found = random.Random(seed), [], []
    for _ in range(count):
        new = []
        if rows and rng.random() < 0.25:
            runner.kv.rows.drop(rows.pop(rng.randrange(len(rows))))
        if len(rows) < 3 and rng.random() < 0.4:
            row = runner.kv.rows.add(rng.choice((100, 300)))
            if row is not None:
                new = [(row, rng.choices(IDS, k=rng.randrange(1, 20)))]
        entries = [(row, [rng.choice(IDS)]) for row in rows] + new
        rows += [row for row, _ in new]
        rng.shuffle(entries)
        if ordered:
            entries.sort(key=lambda entry: len(entry[1]))
        if entries:
            found.append(runner.forward(entries).cpu())
    return found


@pytest.mark.parametrize("seed", range(1 if FEW else 4 if interpreted() else 20))
def test_rows_come_and_go_as_if_all_passes_were_streamed(tmp_path: Path, seed: int) -> None:
    model = zoo_model("qwen2-window")
    path, config = tiny_checkpoint(tmp_path, model), model_config(model.config)
    count, histories = 11 if FEW else 60, []
    for rows in (0, 3):
        with opened(path, config, rows=rows, tokens=768, max_rows=3) as runner:
            histories.append(history(runner, seed, count))
            captured = passes(runner)
    assert 0 < captured < len(histories[0])
    for found, expected in zip(histories[1], histories[0], strict=True):
        assert relative_error(found, expected) <= TOLERANCE


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Any]:
    model = zoo_model("llama")
    return tiny_checkpoint(tmp_path, model), model_config(model.config)


def test_what_is_not_one_token_of_a_few_rows_is_streamed(llama: tuple[Path, Any]) -> None:
    with opened(*llama, rows=2, tokens=768, max_rows=3) as runner:
        rows = [runner.kv.rows.add(50) for _ in range(3)]
        runner.forward([(rows[0], [5])])
        assert passes(runner) == 0, "scales are looked at in the first pass"
        runner.forward([(row, [5]) for row in rows])
        runner.forward([(rows[0], [5, 6])])
        runner.forward([(rows[0], [5]), (rows[1], [6, 7])])
        runner.forward([(rows[0], [5])], on_layer=lambda layer_idx: None)
        assert passes(runner) == 0
        before = runner.streamer.last_pass
        runner.forward([(rows[2], [5]), (rows[0], [6])], every_position=True)
        assert passes(runner) == 1
        assert runner.streamer.last_pass.seconds == before.seconds, "it was no pass of the streamer"
        assert [row.length for row in rows] == [7, 3, 2]


@pytest.mark.parametrize("streams", list(STREAMS)[:1] if FEW else STREAMS)
def test_where_something_streams_each_layer_gives_what_it_does_uncaptured(
    llama: tuple[Path, Any], streams: str
) -> None:
    options = {"max_rows": 3, "tokens": 768, **STREAMS[streams]}
    prompts, found, count = [IDS[:23], IDS[1:30], IDS[2:9]], [], 2 if FEW else 4
    for rows in (0, 4):  # three are padded to four
        with opened(*llama, rows=rows, **options) as runner:
            logits, captured = decode(runner, prompts, count)
            assert captured == bool(rows) * count and not runner.captures_passes
            tiers = set(runner.streamer.plan.tiers)
            assert len(tiers) == (2 if streams == "some layers" else 1)
            assert ("device" in tiers) == (streams not in ("everything", "all layers"))
            found.append(logits)
    assert relative_error(found[1], found[0]) <= TOLERANCE


@contextmanager
def twice() -> Iterator[list[str]]:
    """The device, as two that have lanes, slots and decoders of their own."""

    def make(number: int) -> Any:
        return NearDevice() if interpreted() else CudaDevice(torch.device("cuda:0"))

    with opened_as(make):
        yield ["cpu", "cpu"] if interpreted() else ["cuda:0", "cuda:0"]


OVER_TWO: dict[str, dict[str, Any]] = {
    "keys and values": {"device_budget": None, "n_gpu": 0, "host_layers": (1, 2)},
    "layers": {"device_budget": None, "n_gpu": 1},
    "nothing": {"device_budget": "1GiB"},
}


@pytest.mark.parametrize("streams", list(OVER_TWO)[:1] if FEW else OVER_TWO)
def test_layers_of_two_devices_are_captured_on_each(llama: tuple[Path, Any], streams: str) -> None:
    options = {"max_rows": 4, "tokens": 1024, **OVER_TWO[streams]}
    prompts, count = [IDS[:23], IDS[1:30], IDS[2:9]], 2 if FEW else 4
    with opened(*llama, rows=0, **options) as runner:
        expected, _ = decode(runner, prompts, count)
    with twice() as devices, opened(*llama, rows=4, part=4, device=devices, **options) as runner:
        found, captured = decode(runner, prompts, count)
        assert captured == count and not runner.captures_passes
        first, second = (side.decoder for side in runner.sides)
        assert first is not None and second is not None and first is not second
        if second._graphs is not None:
            assert len(second._graphs) > 0 and not second._graphs.failed
    assert relative_error(found, expected) <= TOLERANCE


@of_many
@pytest.mark.parametrize("seed", range(2 if interpreted() else 20))
def test_rows_come_and_go_over_captured_layers_of_two_devices(tmp_path: Path, seed: int) -> None:
    model = zoo_model("qwen2-window")
    path, config = tiny_checkpoint(tmp_path, model), model_config(model.config)
    options = {"tokens": 768, "max_rows": 3, "device_budget": None, "host_layers": (0, 1)}
    count, histories = 40, []
    for rows in (0, 2):
        with twice() as two:
            devices = two if rows else DEVICE
            with opened(path, config, rows=rows, part=4, device=devices, **options) as runner:
                histories.append(history(runner, seed, count, ordered=True))
                captured = passes(runner)
    assert 0 < captured < len(histories[0])
    for found, expected in zip(histories[1], histories[0], strict=True):
        assert relative_error(found, expected) <= TOLERANCE


@of_many
def test_rounded_layers_of_two_devices_are_captured_on_each(llama: tuple[Path, Any]) -> None:
    given, found, single = {"device_budget": None, "n_gpu": 1}, [], torch.float32
    with (
        twice() as devices,
        opened(*llama, rows=0, device=devices, **given) as runner,
        LayerStreamer.from_checkpoint(llama[0], device=devices, dtype=single) as streamer,
    ):
        own = own_weights(streamer.manifest, runner.names, single)
        held = round_layers(streamer, runner.names, own, single)
        layers, row = (held, runner.config, own.names, runner.kv), runner.kv.rows.add(40)
        assert row is not None
        for rows in (0, 1):
            draft = Runner(*layers, dtype=single, chunking=Chunking(16, captured_rows=rows))
            logits = [draft.forward([(row, ids)]) for ids in ([5, 6, 7], [8], [9], [10])]
            found += [torch.cat(logits).cpu()]
            assert passes(draft) == 3 * rows and not draft.captures_passes
            runner.kv.rows.truncate(row, 0)
            draft.close()
    assert relative_error(found[1], found[0]) <= TOLERANCE


def test_layers_that_the_host_computes_stand_between_captured_ones(
    llama: tuple[Path, Any],
) -> None:
    prompts, count = [IDS[:23], IDS[1:30], IDS[2:9]], 2 if FEW else 4
    options: dict[str, Any] = {"max_rows": 3, "tokens": 768, "device_budget": None, "n_gpu": 1}
    with opened(*llama, rows=0, **options) as runner:
        expected, _ = decode(runner, prompts, count)
    for rows in (0, 4):
        with (
            near_device() if interpreted() else nullcontext(),
            opened(*llama, rows=rows, computed=(0, 2), **options) as runner,
        ):
            found, captured = decode(runner, prompts, count)
            assert captured == bool(rows) * count
            assert runner.host is not None and runner.host.passes == count
        assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("seed", range(1 if FEW else 4 if interpreted() else 20))
def test_rows_come_and_go_over_layers_that_are_captured_one_by_one(
    tmp_path: Path, seed: int
) -> None:
    model = zoo_model("qwen2-window")
    path, config = tiny_checkpoint(tmp_path, model), model_config(model.config)
    options = {"tokens": 768, "max_rows": 3, "device_budget": None, "host_layers": (0, 2)}
    count, histories, beside, halves = 9 if FEW else 60, [], [], set()
    for rows in (0, 2):
        with opened(path, config, rows=rows, part=4, **options) as runner:
            stream = runner._stream
            if runner.decoder is not None:
                launch = runner.decoder.launch

                def heed(size: int, key: Any, work: Any, launch: Any = launch) -> None:
                    halves.add((size, key[0]))
                    launch(size, key, work)

                runner.decoder.launch = heed  # type: ignore[method-assign]

            def note(sections: Any, stream: Any = stream, **given: Any) -> torch.Tensor:
                beside.append(len(sections))
                return stream(sections, **given)

            runner._stream = note  # type: ignore[method-assign]
            histories.append(history(runner, seed, count, ordered=True))
            captured = passes(runner)
    assert 0 < captured < len(histories[0])
    assert 2 in beside, "some rows were captured beside others that were not"
    assert {(0, "before"), (0, "after")} <= halves, "and these in parts"
    for found, expected in zip(histories[1], histories[0], strict=True):
        assert relative_error(found, expected) <= TOLERANCE


def test_a_captured_layer_that_fails_leaves_the_rows_as_they_were(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = STREAMS["everything"]
    with opened(*llama, rows=0, **options) as runner:
        expected, _ = decode(runner, [[5, 6, 7]], 2)
    with opened(*llama, rows=1, **options) as runner:
        row = runner.kv.rows.add(5)
        assert row is not None and runner.decoder is not None
        found = [runner.forward([(row, [5, 6, 7])])]
        for token in (IDS[0], IDS[1]):
            launch = runner.decoder.launch

            def fails(size: int, key: Any, work: Any, launch: Any = launch) -> None:
                launch(size, key, work)
                if key[0] == 1:
                    raise RuntimeError("the second layer")

            with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="second"):
                patched.setattr(runner.decoder, "launch", fails)
                runner.forward([(row, [token])])
            found.append(runner.forward([(row, [token])]))
        assert passes(runner) == 2
    assert relative_error(torch.cat(found).cpu(), expected) <= TOLERANCE


def test_where_keys_are_kept_in_eight_bits_nothing_is_captured_and_a_line_says_so(
    llama: tuple[Path, Any], caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    options = {"host_layers": (1,), "int8": True}
    with opened(*llama, rows=3, **options) as runner:
        decode(runner, [[5, 6]], 2)
        assert runner.decoder is None
    assert [r.getMessage() for r in caplog.records if "are captured" in r.getMessage()] == [
        "no passes are captured: keys and values are kept in eight bits"
    ]


def test_a_pass_that_fails_after_its_launches_is_streamed_as_if_it_had_not_begun(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(*llama, rows=0) as runner:
        expected, _ = decode(runner, [[5, 6, 7]], 2)
    with opened(*llama, rows=1) as runner:
        assert runner.decoder is not None
        launched = []
        monkeypatch.setattr(runner.decoder, "forward", lambda batch, work: launched.append(work()))
        found, captured = decode(runner, [[5, 6, 7]], 2)
    assert (len(launched), captured) == (2, 0)
    assert torch.equal(found, expected)


def test_a_captured_pass_that_overflows_is_found_and_the_row_can_be_taken_back(
    llama: tuple[Path, Any],
) -> None:
    with opened(*llama, rows=1, dtype=torch.float16) as runner:
        row = runner.kv.rows.add(20)
        assert row is not None
        runner.forward([(row, [5, 6, 7])])
        expected = runner.forward([(row, [8])])
        runner.kv.rows.truncate(row, 3)
        place = row.place(runner.kv.span(1), 0)
        memory = runner.kv.open(1)
        kept = memory[place].clone()
        memory[place] = float("inf")
        with np.errstate(all="ignore"):  # NumPy, which the interpreter computes with, warns
            logits = runner.forward([(row, [8])])
            assert choose_tokens(logits, [Sampler()]) == [None] and passes(runner) == 2
            runner.kv.rows.truncate(row, 3)
            (why,) = why_not_finite(runner, [(row, [8])])
        assert "layer 1" in why and "float16 is too small" in why and row.length == 3
        memory[place] = kept
        assert torch.equal(runner.forward([(row, [8])]), expected)


def test_logits_of_a_pass_are_not_those_of_the_next(llama: tuple[Path, Any]) -> None:
    with opened(*llama, rows=1) as runner:
        row = runner.kv.rows.add(20)
        assert row is not None
        runner.forward([(row, [5, 6])])
        first = runner.forward([(row, [7])])
        kept = first.clone()
        runner.forward([(row, [8])])
        assert torch.equal(first, kept)
