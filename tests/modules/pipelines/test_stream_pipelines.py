"""Whole pipelines of diffusers: they draw what they draw with all weights in memory."""

from __future__ import annotations

import gc
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import one_torch_thread
from recipes import quiet
from tiny_pipelines import PIPELINES, held, picture, save_pipeline, streamed, taken, tiers

from layer_streamer import ClosedError, stream

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

ADDRESSES = {"StableDiffusion3Pipeline": 1e-5, "StableDiffusionXLPipeline": 1e-5}
"""What pictures differ by with the addresses of operands, on a CPU."""


def test_a_pipeline_draws_the_same_picture_to_the_bit(flux: Path, drawn: torch.Tensor) -> None:
    import diffusers

    with quiet(), one_torch_thread():
        pipe = stream(diffusers.FluxPipeline, flux, device="cpu", n_gpu=1)
        assert type(pipe) is diffusers.FluxPipeline
        assert list(pipe.layer_streamer.components) == [
            "transformer", "text_encoder_2", "text_encoder",
        ]  # fmt: skip
        for _ in range(2):
            assert torch.equal(picture(pipe), drawn)
    passes = pipe.layer_streamer.last_pass
    assert all(passes[name] for name in pipe.layer_streamer.components)
    assert pipe.transformer.layer_streamer is pipe.layer_streamer.components["transformer"]
    pipe.layer_streamer.close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_kind_of_pipeline_draws_the_same(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    import diffusers

    with quiet(), one_torch_thread():
        save_pipeline(name, tmp_path)
        want = picture(getattr(diffusers, name).from_pretrained(tmp_path, dtype=dtype))
    with streamed(tmp_path, dtype=dtype) as pipe:
        error = (picture(pipe).float() - want.float()).abs().max()
        assert error <= (ADDRESSES.get(name, 0.0) if dtype is torch.float32 else 2**-7)
        passes = pipe.layer_streamer.last_pass
        assert all(passes[name] for name in passes)
        if name == "StableDiffusionXLPipeline":
            # Of lists within the few levels of its two halves, too.
            assert {name.partition(".")[0] for name in passes["unet"]} == {
                "down_blocks", "mid_block", "up_blocks",
            }  # fmt: skip


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_one_budget_holds_all_components_and_denoisers_fill_it_first(
    flux: Path, drawn: torch.Tensor, share: float
) -> None:
    with streamed(flux) as pipe:
        least = taken(pipe.layer_streamer.plan)
        blocks = pipe.layer_streamer.plan.components["transformer"].sequences
        more = sum(size.device_nbytes for plan in blocks.values() for size in plan.sizes)
    budget = least + int(share * more)
    with streamed(flux, device_budget=budget) as pipe:
        plan = pipe.layer_streamer.plan
        assert 0.9 * budget < taken(plan) <= budget
        assert tiers(plan, "transformer") == {"device", "disk"}
        smallest = min(size.device_nbytes for p in blocks.values() for size in p.sizes)
        assert held(plan, "text_encoder_2") + held(plan, "text_encoder") < smallest
        assert torch.equal(picture(pipe), drawn)


def test_what_fits_is_resident_and_nothing_streams(flux: Path, drawn: torch.Tensor) -> None:
    with streamed(flux, device_budget="1GiB") as pipe:
        plan = pipe.layer_streamer.plan
        assert {t for name in plan.components for t in tiers(plan, name)} == {"device"}
        assert torch.equal(picture(pipe), drawn)


def test_text_encoders_which_run_once_have_one_slot_if_nobody_says_more(flux: Path) -> None:
    for n_gpu, want in ((None, 1), (2, 3)):
        with streamed(flux, n_gpu=n_gpu) as pipe:
            plan = pipe.layer_streamer.plan.components
            (slots,) = plan["text_encoder_2"].sequences["encoder.block"].placement.device_slots
            assert slots.count == want
            (slots,) = plan["transformer"].sequences["transformer_blocks"].placement.device_slots
            assert slots.count == 3


def test_the_plan_names_components_residents_and_the_reserve(flux: Path) -> None:
    with streamed(flux, device_budget="64MiB", reserve_bytes="1MiB") as pipe:
        plan = pipe.layer_streamer.plan
    text = str(plan)
    assert list(plan.resident_nbytes) == ["vae"]
    assert plan.resident_nbytes["vae"] == sum(p.nbytes for p in pipe.vae.parameters())
    for words in ("transformer\ntransformer_blocks:", "text_encoder_2\nencoder.block:"):
        assert words in text
    assert "vae: resident: 170 KiB" in text
    assert text.count("reserve_bytes") == 1
    assert taken(plan) <= (63 << 20)


def test_after_its_end_plan_and_report_stay_and_a_call_says_that_it_is_closed(flux: Path) -> None:
    with streamed(flux) as pipe:
        picture(pipe)
    handle = pipe.layer_streamer
    handle.close()
    assert handle.closed
    assert all(streamer.closed for streamer in handle.components.values())
    assert "transformer_blocks" in str(handle.plan)
    assert handle.last_pass["transformer"]
    with pytest.raises(ClosedError, match="its weights do not stream any more"):
        picture(pipe)


def test_a_pipeline_that_nobody_holds_closes_its_streamers(flux: Path) -> None:
    before = threading.active_count()
    with quiet(), one_torch_thread():
        pipe: Any = stream(flux, device="cpu")
        picture(pipe)
    inner = [
        streamer._parts.pipeline
        for handle in pipe.layer_streamer.components.values()
        for streamer in handle._streamers.values()
    ]
    assert threading.active_count() > before
    del pipe
    gc.collect()
    assert all(pipeline.control.closing for pipeline in inner)


def test_components_of_the_callers_own_take_the_place_of_the_pipelines(
    flux: Path, drawn: torch.Tensor
) -> None:
    import diffusers

    with quiet():
        vae: Any = diffusers.AutoencoderKL.from_pretrained(flux / "vae")
        encoder: Any = stream(flux / "text_encoder_2", device="cpu")
    given = {"vae": vae, "text_encoder_2": encoder, "text_encoder": None, "tokenizer": None}
    with streamed(flux, model_options={"vae": vae, "text_encoder_2": encoder}) as pipe:
        assert pipe.vae is vae
        assert pipe.text_encoder_2 is encoder
        assert list(pipe.layer_streamer.components) == ["transformer", "text_encoder"]
        assert list(pipe.layer_streamer.plan.resident_nbytes) == ["vae"]
        assert torch.equal(picture(pipe), drawn)
    assert not encoder.layer_streamer.closed
    with streamed(flux, model_options=given) as pipe:
        assert pipe.text_encoder is None
        assert list(pipe.layer_streamer.components) == ["transformer"]
    encoder.layer_streamer.close()


@pytest.mark.slow
def test_guidance_by_two_calls_a_step_and_rows_from_host_memory_change_nothing(flux: Path) -> None:
    import diffusers

    more = {"true_cfg_scale": 2.0, "negative_prompt": "the mat"}
    with streamed(flux, embeddings="host", strict=True) as pipe:
        want = picture(diffusers.FluxPipeline.from_pretrained(flux), **more)
        assert torch.equal(picture(pipe, **more), want)


@pytest.mark.slow
def test_another_pipeline_of_the_same_components_shares_them(flux: Path) -> None:
    import diffusers

    start = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with streamed(flux) as pipe:
        plain = diffusers.FluxPipeline.from_pretrained(flux)
        found = [
            picture(diffusers.FluxImg2ImgPipeline.from_pipe(some), image=start, strength=1.0)
            for some in (plain, pipe)
        ]
        assert torch.equal(*found)


@pytest.mark.slow
def test_adapters_are_loaded_scaled_and_unloaded_by_the_pipelines_own_loader(
    flux: Path, tmp_path: Path, drawn: torch.Tensor
) -> None:
    import diffusers

    peft = pytest.importorskip("peft")
    with streamed(flux) as pipe:
        plain = diffusers.FluxPipeline.from_pretrained(flux)
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=["to_q", "proj_out", "x_embedder"], init_lora_weights=False
        )
        plain.transformer.add_adapter(config)
        plain.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"],
                                                       init_lora_weights=False))  # fmt: skip
        diffusers.FluxPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=peft.get_peft_model_state_dict(plain.transformer),
            text_encoder_lora_layers=peft.get_peft_model_state_dict(plain.text_encoder),
        )
        plain.unload_lora_weights()
        seen = []
        for some in (plain, pipe):
            some.load_lora_weights(tmp_path, adapter_name="one")
            seen.append(picture(some))
            some.set_adapters(["one"], [0.5])
            seen.append(picture(some))
            some.unload_lora_weights()
            assert torch.equal(picture(some), drawn)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], drawn)
