"""stream() on an NVIDIA GPU: the resident model's answers, in the memory that was said."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from tiny_diffusers import DIFFUSERS, run_diffuser, tiny_diffuser
from tiny_models import REPRESENTATIVE, has, least, run, tiny_class, tiny_inputs, tiny_model

from layer_streamer import stream

pytestmark = pytest.mark.gpu

KERNELS = 1e-5
"""What a GPU's kernels differ by with the addresses of their operands, in float32."""
UNMARKED = {"resnet"}
"""Types whose classes mark no blocks."""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_stays_on_the_device() -> Iterator[None]:
    """What a test made there is given back before the next one looks at it."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def saved(name: str, folder: Path) -> Any:
    """A tiny model as a folder; what transformers loads from it, on the GPU."""
    with quiet():
        tiny_model(name).save_pretrained(folder)
        return loaded(tiny_class(name), folder).eval().to("cuda")


def streamed(name: str, folder: Path, **options: Any) -> Any:
    with quiet():
        return stream(folder, cls=tiny_class(name), **{"device_budget": 64 * MIB, **options})


def agree(name: str, want: dict[str, torch.Tensor], model: Any, times: int = 2) -> None:
    for _ in range(times):
        with quiet():
            got = run(name, model)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert torch.allclose(got[key], tensor, rtol=0, atol=KERNELS), key


def squeezed(name: str, folder: Path, ahead: int = 1, **options: Any) -> Any:
    """In the least memory that holds it: with one slot, and as many ``ahead``."""
    whole = streamed(name, folder) if name else stream(folder, device_budget=64 * MIB)
    budget = least(whole, ahead)
    whole.layer_streamer.close()
    if not name:
        return stream(folder, device_budget=budget, n_gpu=ahead)
    return streamed(name, folder, device_budget=budget, n_gpu=ahead, **options)


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVE if name not in UNMARKED])
@pytest.mark.parametrize("budget", ["all", "one slot"])
def test_a_streamed_model_answers_as_the_resident_one(
    tmp_path: Path, name: str, budget: str
) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    plain = saved(name, tmp_path)
    with quiet():
        want = run(name, plain)
    if budget == "all":
        model = streamed(name, tmp_path)
    else:
        model = squeezed(name, tmp_path, ahead=0)
        plans = model.layer_streamer.plan.sequences.values()
        assert any("device" not in plan.tiers for plan in plans)
    assert model.device == plain.device
    agree(name, want, model)
    model.layer_streamer.close()


@pytest.mark.parametrize("options", [
    {"n_cpu_pinned": 0, "n_cpu": 0, "read_mode": "direct"},
    {"n_cpu_pinned": 1, "read_mode": "buffered"},
    {"read_mode": "mapped"},
    {"host_budget": "1GiB", "read_mode": "buffered"},
], ids=["ring", "pools", "mapped", "arena"])  # fmt: skip
def test_it_does_so_on_every_way_from_the_disk(tmp_path: Path, options: dict[str, Any]) -> None:
    want = run("qwen3_moe", saved("qwen3_moe", tmp_path))
    model = squeezed("qwen3_moe", tmp_path, **options)
    agree("qwen3_moe", want, model)
    model.layer_streamer.close()


@pytest.mark.parametrize("name", [name for name in DIFFUSERS if name != "AutoencoderKL"])
def test_a_diffusion_transformer_gives_what_the_resident_one_gives(
    tmp_path: Path, name: str
) -> None:
    pytest.importorskip("diffusers")
    plain = tiny_diffuser(name)
    plain.save_pretrained(tmp_path)  # type: ignore[operator]
    want = run_diffuser(name, plain.to("cuda"))
    model = squeezed("", tmp_path, ahead=0)
    for _ in range(2):
        assert torch.allclose(run_diffuser(name, model), want, rtol=0, atol=KERNELS)
    model.layer_streamer.close()


def test_weights_take_no_more_of_the_device_than_was_said(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    model = squeezed("llama", tmp_path)
    some = least(model, 1)
    model.layer_streamer.close()
    del model
    gc.collect()
    before = torch.cuda.memory_allocated()
    for budget in (some, 2 * some):
        model = streamed("llama", tmp_path, device_budget=budget, n_gpu=1)
        # Of each allocation up to 511 bytes are the allocator's own, and buffers are not weights.
        taken = torch.cuda.memory_allocated() - before
        assert taken <= budget + 512 * len(list(model.parameters())) + MIB // 16
        model.layer_streamer.close()
        del model
        gc.collect()
        assert torch.cuda.memory_allocated() == before


def test_the_default_budget_leaves_what_the_plan_says(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    model: Any = stream(tmp_path)
    assert model.layer_streamer.plan.reserve_nbytes == 2 << 30
    plans = model.layer_streamer.plan.sequences.values()
    assert {tier for plan in plans for tier in plan.tiers} == {"device"}
    assert not model.layer_streamer.last_pass, "nothing has to move"
    model.layer_streamer.close()


def test_it_runs_on_a_stream_of_the_callers(tmp_path: Path) -> None:
    want = run("llama", saved("llama", tmp_path))
    model = squeezed("llama", tmp_path)
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            agree("llama", want, model)
    model.layer_streamer.close()


def test_weights_stay_until_the_device_has_computed_with_them(tmp_path: Path) -> None:
    """The host is far ahead: a long computation stands before each block."""
    plain = saved("llama", tmp_path)
    ids = tiny_inputs("llama")["input_ids"].cuda()
    with torch.no_grad():
        want = plain(ids).logits
    model = squeezed("llama", tmp_path)
    busy = torch.randn(2048, 2048, device="cuda")

    def stall(*args: object) -> None:
        for _ in range(20):
            busy.mm(busy)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(stall)
    with torch.no_grad():
        got = [model(ids).logits for _ in range(4)]
    assert all(torch.allclose(each, want, rtol=0, atol=KERNELS) for each in got)
    model.layer_streamer.close()


def test_an_error_in_a_forward_leaves_the_next_one_right(tmp_path: Path) -> None:
    want = run("llama", saved("llama", tmp_path))
    model = squeezed("llama", tmp_path)

    def fail(*args: object) -> None:
        raise KeyError("a hook")

    for layer in model.model.layers:
        handle = layer.register_forward_hook(fail)
        with pytest.raises(KeyError, match="a hook"):
            run("llama", model)
        handle.remove()
        agree("llama", want, model, times=1)
    model.layer_streamer.close()


def test_a_full_device_says_which_numbers_to_change(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    model = streamed("llama", tmp_path)

    def fill(*args: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    handle = model.model.layers[1].register_forward_hook(fill)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run("llama", model)
    assert any("reserve_bytes=" in note for note in caught.value.__notes__)
    handle.remove()
    model.layer_streamer.close()


def test_compiled_blocks_give_the_same(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path)
    ids = tiny_inputs("llama")["input_ids"].cuda()
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
    model = squeezed("llama", tmp_path)
    with torch.no_grad(), quiet():
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward)
        got = [model(ids, use_cache=False).logits for _ in range(3)]
    assert all(torch.allclose(each, want, rtol=0, atol=1e-4) for each in got)
    model.layer_streamer.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5", "whisper", "llava", "mamba2"])
def test_on_two_devices_it_answers_as_on_one(tmp_path: Path, name: str) -> None:
    want = run(name, saved(name, tmp_path))
    model = streamed(name, tmp_path, device=["cuda:0", "cuda:1"], n_gpu=1)
    plans = model.layer_streamer.plan.sequences.values()
    assert all(min(plan.placement.device_bytes) > 0 for plan in plans)
    agree(name, want, model)
    model.layer_streamer.close()
