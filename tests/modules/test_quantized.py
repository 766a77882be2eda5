"""Quantized checkpoints: what from_pretrained makes of them on a CPU, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packings import PACKINGS
from recipes import differences, loaded, made, made_all, manifest_of, write
from tiny_models import tiny_class, tiny_config, tiny_model, tiny_model_on_meta
from tiny_quantized import packed_checkpoint, quantized_checkpoint
from transformers.core_model_loading import WeightTransform

from layer_streamer import ConfigError
from layer_streamer.modules.naming.names import Names, name_tensors
from layer_streamer.modules.naming.quantized import prepare_quantized

CPU = torch.device("cpu")
OLD = int(transformers.__version__.split(".")[1]) < 20
NEWER = "a newer one can" if OLD else ""
BITS = {"load_in_4bit": True}


def names_of(folder: Path, device: torch.device = CPU) -> tuple[Names, Any]:
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prepare_quantized(model, device)
    return name_tensors(model, manifest_of(folder)), model


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "fp8"), ("mixtral", "fp8"), ("gpt_oss", "mxfp4"), ("llama", "ct_int4"),
     ("mixtral", "ct_fp8"), pytest.param("qwen3_moe", "ct_int4", marks=pytest.mark.slow),
     pytest.param("llama", "ct_fp8", marks=pytest.mark.slow)],
)  # fmt: skip
def test_numbers_are_those_that_from_pretrained_unpacks(
    name: str, method: str, tmp_path: Path
) -> None:
    quantized_checkpoint(tmp_path, name, method)
    options: dict[str, Any] = {}
    if method.startswith("ct"):
        if OLD:
            pytest.skip("this transformers unpacks whole models only")
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    names, _ = names_of(tmp_path)
    reference = loaded(transformers.AutoModelForCausalLM, tmp_path, dtype="auto", **options)
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), reference) == []
    assert any(r.convert for r in names.recipes.values())


@pytest.mark.skipif(OLD, reason="this transformers unpacks whole models only")
@pytest.mark.parametrize(
    ("name", "packing"),
    [("llama", "awq-g32"), ("llama", "gptq4-g32"), ("llama", "gptq4-v2-act-order"),
     ("llama", "gptq8-v2-channel"), ("mixtral", "gptq8-act-order"), ("mixtral", "awq-g32")],
)  # fmt: skip
def test_gptq_and_awq_weights_are_the_numbers_that_were_packed(
    name: str, packing: str, tmp_path: Path
) -> None:
    numbers = packed_checkpoint(tmp_path, name, PACKINGS[packing])
    names, _ = names_of(tmp_path)
    dense = tmp_path / "dense"
    tiny_model(name).save_pretrained(dense)
    write(dense, numbers)
    reference = loaded(tiny_class(name), dense, dtype=torch.bfloat16)
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), reference) == []


def test_a_conversion_that_was_interrupted_leaves_nothing_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, _ = names_of(quantized_checkpoint(tmp_path, "llama", "fp8"))
    recipe = next(recipe for recipe in names.recipes.values() if recipe.convert)
    want = made(recipe)
    add = WeightTransform.add_tensor

    def interrupted(self: WeightTransform, *args: Any) -> None:
        add(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WeightTransform, "add_tensor", interrupted)
        made(replace(recipe, pieces=recipe.pieces[::-1]))
    assert torch.equal(made(recipe), want)


@pytest.mark.parametrize(("name", "method"), [("llama", "fp8"), ("gpt_oss", "mxfp4")])
def test_conversions_do_not_depend_on_the_modules_later_names(
    name: str, method: str, tmp_path: Path
) -> None:
    names, model = names_of(quantized_checkpoint(tmp_path, name, method))
    want = made_all(names)
    for layer in model.model.layers:
        for child, module in [*layer.named_children()]:
            setattr(layer, child, torch.nn.ModuleDict({"base_layer": module}))
    got = made_all(names)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_what_is_read_of_a_quantized_weight_is_its_packed_bytes(tmp_path: Path) -> None:
    names, _ = names_of(quantized_checkpoint(tmp_path, "gpt_oss", "mxfp4"))
    for recipe in names.recipes.values():
        if recipe.name.endswith("_proj") and recipe.convert:
            numbers = torch.Size(recipe.convert.shape).numel()
            assert recipe.nbytes == numbers // 2 + numbers // 32


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_where_a_gpu_computes_in_fp8_weights_and_scales_stay_as_they_lie(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *args: (9, 0))
    quantized_checkpoint(tmp_path, name, "fp8")
    names, model = names_of(tmp_path, torch.device("cuda", 0))
    assert (names.missing, names.unused) == ((), ())
    assert not any(recipe.convert for recipe in names.recipes.values())
    stored = {recipe.dtype for recipe in names.recipes.values()}
    assert stored == {torch.float8_e4m3fn, torch.float32, torch.bfloat16}
    state = model.state_dict()
    assert all(tuple(state[n].shape) == r.shape for n, r in names.recipes.items())


def test_without_quantization_nothing_is_done() -> None:
    model = tiny_model_on_meta("llama")
    prepare_quantized(model, CPU)
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize(
    ("config", "reason"),
    [(BITS, "'bitsandbytes' cannot be streamed.*while they are loaded.*quantize`"),
     (transformers.BitsAndBytesConfig(**BITS), "'bitsandbytes'.*layer-streamer quantize"),
     ({"quant_method": "gptq", "bits": 3}, NEWER or "'gptq' with 3 bits.*or gptq_v2"),
     ({"quant_method": "awq", "version": "gemv"}, NEWER or "'gemv' with 4 bits.*expected gemm"),
     ({"quant_method": "torchao"}, "'torchao' cannot be streamed.*no plain tensors"),
     ({"quant_method": "fp8", "activation_scheme": "odd"}, "'fp8' cannot be run here: .*odd")],
)  # fmt: skip
def test_what_cannot_be_lent_is_refused_in_one_line_with_the_way_out(
    config: Any, reason: str
) -> None:
    settings = tiny_config("llama")
    settings.quantization_config = config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=reason) as caught:
        prepare_quantized(model, CPU)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before
