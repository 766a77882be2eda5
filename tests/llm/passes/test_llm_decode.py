"""Passes in which every row takes one token: their kernels, and the same passes captured."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from byte_model import byte_model
from parts import PART, parts
from paths import ENGINE
from triton_runs import EVERY_CASE, INTERPRETED, needs_triton, run_checks

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.passes.runner_step import RunnerStep

CHECKS = [ENGINE / "decode_kernels_against_torch.py", ENGINE / "decode_against_streamed.py"]


@needs_triton
def test_captured_passes_and_their_kernels_are_right_in_the_interpreter() -> None:
    run_checks(INTERPRETED, *CHECKS)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", parts(5))
def test_captured_passes_of_every_architecture_are_right_in_the_interpreter(part: str) -> None:
    run_checks(INTERPRETED | {EVERY_CASE: "1", PART: part}, *CHECKS)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("part", parts(3))
@pytest.mark.parametrize("checks", CHECKS, ids=lambda checks: checks.stem)
def test_captured_passes_and_their_kernels_are_right_on_a_gpu(checks: Path, part: str) -> None:
    run_checks({"TRITON_INTERPRET": "0", PART: part}, checks)


gpu = pytest.mark.gpu
PROMPTS = [[1 + i] * length for i, length in enumerate((3, 120, 117, 60))]


def engine(path: Path, **options: Any) -> StreamingEngine:
    """One that computes in float32 and holds all of a tiny model."""
    defaults = {"device": "cuda", "dtype": torch.float32, "max_length": 128, "kv_tokens": 1024}
    return StreamingEngine(path, **(defaults | {"device_budget": "1GiB"} | options))


def ids(running: StreamingEngine, prompts: Any, **options: Any) -> list[Any]:
    options = {"max_new_tokens": 64, "temperature": 0, "return_details": True} | options
    return [done.ids for done in running.generate(prompts, **options)]


def captured(running: StreamingEngine) -> int:
    decoder = running._runner.decoder
    return 0 if decoder is None else decoder.passes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


@needs_triton
@gpu
def test_rows_that_end_at_different_times_get_the_ids_of_streamed_passes(path: Path) -> None:
    with engine(path, device_budget=None) as plain:
        assert not plain.plan.captures
        expected, more = ids(plain, PROMPTS), ids(plain, PROMPTS * 3)
        assert captured(plain) == 0
    assert len({len(row) for row in expected}) > 2
    with engine(path) as running:
        assert running.plan.captures and "captured passes" in str(running.plan)
        assert ids(running, PROMPTS) == expected
        assert captured(running) == 63, "all but the prompts' pass"
        assert ids(running, PROMPTS) == expected
        assert ids(running, PROMPTS * 3) == more, "rows enter as others leave"


@needs_triton
@gpu
@pytest.mark.parametrize("layers", [False, True], ids=["keys and values", "layers as well"])
def test_where_something_streams_captured_layers_give_the_ids_of_others(
    path: Path, layers: bool
) -> None:
    options: dict[str, Any] = {"max_batch": 12, "kv_tokens": 12 * 256, "kv": "host"}
    if layers:
        with engine(path, **options) as running:  # the least that it needs, and nothing to spare
            options["device_budget"] = running.plan.device_nbytes
    with engine(path, **(options | {"device_budget": None})) as plain:
        expected, more = ids(plain, PROMPTS), ids(plain, PROMPTS * 3)
        drawn = ids(plain, PROMPTS, seed=3, temperature=1.0)
        assert captured(plain) == 0
    with engine(path, **options) as running:
        assert running.plan.captures_layers and not running.plan.captures
        assert (set(running.streamer.plan.tiers) == {"device"}) != layers
        assert "captured layers" in str(running.plan)
        for _ in range(2):
            assert ids(running, PROMPTS) == expected
        assert captured(running) == 2 * 63, "all but the prompts' passes"
        assert ids(running, PROMPTS * 3) == more, "rows enter as others leave"
        assert ids(running, PROMPTS, seed=3, temperature=1.0) == drawn
        decoder = running._runner.decoder
        assert decoder is not None and decoder._graphs is not None
        assert not decoder._graphs.failed
        most = 5 * 9 * running.streamer.num_steps
        assert 0 < len(decoder._graphs) <= most, "of 1 to 16 rows, in few slots"


@needs_triton
@gpu
def test_sampling_and_kept_rows_are_as_with_streamed_passes(path: Path) -> None:
    found = []
    for budget in (None, "1GiB"):
        with engine(path, device_budget=budget) as running:
            drawn = ids(running, PROMPTS, seed=3, temperature=1.0, repetition_penalty=1.2)
            options = {"max_new_tokens": 30, "reuse_prefix": True, "return_details": True}
            first = running.generate(PROMPTS[0], **options).ids
            again = running.generate([*PROMPTS[0], *first[:20], 7, 8], **options).ids
            found.append((drawn, first, again))
            assert bool(captured(running)) == bool(budget)
    assert found[0] == found[1]


@needs_triton
@gpu
@pytest.mark.parametrize("kv", ["device", "host"])
def test_closing_returns_all_that_captured_passes_took(path: Path, kv: str) -> None:
    def left() -> tuple[int, int]:
        with engine(path, kv=kv) as running:
            ids(running, PROMPTS)
            assert captured(running)
        del running
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    first = left()  # what libraries keep is taken once
    assert [left() for _ in range(3)] == [first] * 3


@needs_triton
@gpu
def test_a_layer_whose_capture_breaks_off_is_launched_as_all_others_are(
    path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(path, device_budget=None, kv="host") as plain:
        expected = ids(plain, PROMPTS)
    with engine(path, kv="host") as running:
        seen, launch = [], RunnerStep._launch

        def waits(run: Any, section: Any, idx: int, addresses: Any, work: Any) -> None:
            def both() -> None:
                work()
                if idx == 1:
                    seen.append(idx)
                    torch.cuda.synchronize()  # which a capture does not allow

            launch(run, section, idx, addresses, both)

        monkeypatch.setattr(RunnerStep, "_launch", waits)
        assert ids(running, PROMPTS) == expected
        assert captured(running) == 1, "the first was done to its end"
        assert ids(running, PROMPTS) == expected
    torch.cuda.empty_cache()
    messages = [r.getMessage() for r in caplog.records if "could not be captured" in r.getMessage()]
    assert len(messages) == 1 and "\n" not in messages[0] and seen


@needs_triton
@gpu
def test_a_capture_that_breaks_off_leaves_everything_as_it_was(path: Path, caplog: Any) -> None:
    with engine(path, device_budget=None) as plain:
        expected = ids(plain, PROMPTS)
    with engine(path) as running:
        decoder = running._runner.decoder
        assert decoder is not None
        attention = decoder.attention

        def waits(batch: Any, **options: Any) -> Any:
            torch.cuda.synchronize()  # which a capture does not allow
            return attention(batch, **options)

        decoder.attention = waits  # type: ignore[method-assign]
        stream = torch.cuda.current_stream()
        assert ids(running, PROMPTS) == expected
        assert ids(running, PROMPTS) == expected
        assert captured(running) == 1, "the first had been launched before it was captured"
        assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    messages = [r.getMessage() for r in caplog.records if "could not be captured" in r.getMessage()]
    assert len(messages) == 1 and "\n" not in messages[0]
    with engine(path) as running:
        assert ids(running, PROMPTS) == expected
        assert captured(running) == 63, "another engine captures"


@needs_triton
@gpu
@pytest.mark.parametrize("kv", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_peak_with_captures_of_any_number_of_rows_stays_inside_the_plan(
    tmp_path: Path, dtype: torch.dtype, kv: str
) -> None:
    model = tiny_model(
        "qwen2", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=64000,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1 << 14,
        tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    path, budget = tiny_checkpoint(tmp_path, model), 2 << 30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    options = {"dtype": dtype, "max_length": 4096, "kv_tokens": 8 * 4096, "device_budget": budget}
    with engine(path, kv=kv, **options) as running:
        for rows in (1, 8, 3, 5, 2, 7, 4, 6):
            prompts = [[2 + i] * 3000 for i in range(rows)]
            ids(running, prompts, max_new_tokens=4)
        assert captured(running) == 8 * 3
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - before
        plan = running.plan
    # The plan counts the least that the streamer needs; it was given what its layers take.
    needed = plan.device_nbytes - plan.device["layers"] + model.num_parameters() * dtype.itemsize
    assert peak <= min(budget, needed + (8 << 20))
