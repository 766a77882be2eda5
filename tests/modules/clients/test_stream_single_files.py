"""Diffusion models from single files as their makers publish them, plain and packed as GGUF."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from assets import one_torch_thread
from recipes import quiet
from safetensors.torch import save_file
from torch import nn

from layer_streamer import CheckpointError, ConfigError, Manifest, TensorSpec, stream
from layer_streamer.checkpoint.ggml_types import GGML_TYPES
from layer_streamer.checkpoint.manifest import FrozenMapping
from layer_streamer.modules.naming.names import name_tensors

diffusers = pytest.importorskip("diffusers")
single_file_model = pytest.importorskip("diffusers.loaders.single_file_model")

from original_files import ORIGINALS, flux_rows, write_packed, write_safetensors  # noqa: E402
from tiny_diffusers import run_diffuser, tiny_diffuser, tiny_diffuser_on_meta  # noqa: E402
from tiny_pipelines import picture, save_pipeline  # noqa: E402

SD3 = "SD3Transformer2DModel"
ADDRESSES = 1e-6
"""How far answers are apart whose kernels depend on where tensors lie."""


def empty(name: str) -> Any:
    with quiet():
        return tiny_diffuser_on_meta(name)


def original(folder: Path, name: str = SD3, kind: str | None = None) -> tuple[Any, Path]:
    """A tiny model, and its file, beside a folder with its configuration."""
    with quiet():
        model: Any = tiny_diffuser(name)
        model.save_pretrained(folder / "folder")
        tensors = ORIGINALS[name](model)
    if kind is None:
        return model, write_safetensors(folder / "model.safetensors", tensors)
    return model, write_packed(folder / "model.gguf", tensors, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", list(ORIGINALS))
def test_answers_are_those_of_from_single_file(tmp_path: Path, name: str, kind: str | None) -> None:
    model, path = original(tmp_path, name, kind)
    options: dict[str, Any] = {}
    if kind is not None:
        packed = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        options["quantization_config"] = packed
    with quiet():
        plain = type(model).from_single_file(
            str(path), config=str(tmp_path / "folder"), torch_dtype=torch.float32, **options
        )
        config = {"config": tmp_path / "folder"}
        net: Any = stream(type(model), path, model_options=config, device="cpu", n_gpu=1)
        assert type(net) is type(model)
        want = run_diffuser(name, plain.eval())
        for _ in range(2):
            assert torch.allclose(run_diffuser(name, net), want, rtol=0, atol=ADDRESSES)
        if kind is not None:
            assert not torch.allclose(run_diffuser(name, model), want, rtol=0, atol=1e-4)
    net.layer_streamer.close()


@pytest.mark.slow
def test_a_pipeline_draws_the_same_with_a_transformer_from_a_packed_file(tmp_path: Path) -> None:
    name = "StableDiffusion3Pipeline"
    with quiet(), one_torch_thread():
        save_pipeline(name, tmp_path / "pipe")
        plain = getattr(diffusers, name).from_pretrained(tmp_path / "pipe")
        folder = tmp_path / "pipe" / "transformer"
        tensors = ORIGINALS[SD3](plain.transformer)
        path = write_packed(tmp_path / "model.gguf", tensors, "Q8_0")
        packed = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        plain.transformer = type(plain.transformer).from_single_file(
            str(path), config=str(folder), quantization_config=packed, torch_dtype=torch.float32
        )
        transformer = stream(
            type(plain.transformer), path, model_options={"config": folder}, device="cpu", n_gpu=1
        )
        pipe: Any = stream(
            tmp_path / "pipe", model_options={"transformer": transformer}, device="cpu", n_gpu=1
        )
        assert torch.allclose(picture(pipe), picture(plain), rtol=0, atol=1e-5)
    pipe.layer_streamer.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"config": "nowhere"}])
def test_a_single_file_needs_a_configuration(tmp_path: Path, options: dict[str, Any]) -> None:
    model, path = original(tmp_path)
    with pytest.raises(ConfigError, match=r"a single file says nothing of its model: name a fold"):
        stream(type(model), path, model_options=options, device="cpu")


def flux_manifest(kind: str | None) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """The headers of a Flux of two and two blocks, matrices of blocks packed as ``kind``; and by
    name, in place of its rows, the bytes at which they begin."""
    path, offset = Path("/nowhere/flux"), 0
    specs, rows = dict[str, TensorSpec](), dict[str, torch.Tensor]()
    sizes = {some.name: some for some in GGML_TYPES.values()}
    for name, shape in flux_rows(2, 2).items():
        dtype, stored, ggml_type = torch.bfloat16, shape, None
        if kind is not None:
            ggml_type = "BF16"
            if len(shape) == 2 and "blocks." in name:
                packed = sizes[kind]
                row = shape[1] // packed.block_elements * packed.block_bytes
                dtype, stored, ggml_type = torch.uint8, (shape[0], row), kind
        row = math.prod(stored[1:]) * dtype.itemsize
        rows[name] = offset + row * torch.arange(shape[0])
        specs[name] = TensorSpec(name, dtype, stored, path, offset, row * shape[0], ggml_type)
        offset += row * shape[0]
    return Manifest(path, "gguf", (), FrozenMapping(specs), FrozenMapping({})), rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "Q4_K"])
def test_each_row_of_a_flux_is_read_from_where_diffusers_would_take_it(kind: str | None) -> None:
    with quiet(), torch.device("meta"):
        options = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
        net: Any = diffusers.FluxTransformer2DModel(**options).to(torch.bfloat16)
    manifest, rows = flux_manifest(kind)
    names = name_tensors(net, manifest)
    assert (names.missing, names.unused) == ((), ())
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    want = entry["checkpoint_mapping_fn"](checkpoint=rows)
    assert want.keys() == names.recipes.keys()
    for name, recipe in names.recipes.items():
        row = recipe.nbytes // len(want[name])
        begins = [torch.arange(p.offset, p.offset + p.nbytes, row) for p in recipe.pieces]
        assert torch.equal(torch.cat(begins), want[name]), name
        assert (recipe.convert is not None) == (recipe.dtype is torch.uint8)


@pytest.mark.slow
def test_a_fused_tensors_parts_are_read_once_each_and_packed_ones_as_they_lie(
    tmp_path: Path,
) -> None:
    model, path = original(tmp_path, kind="Q8_0")
    net: Any = stream(empty(SD3), path, device="cpu", n_gpu=1)
    (streamer,) = net.layer_streamer._streamers.values()
    read = streamer.manifest.layers[0].nbytes
    weights = [m.weight for m in model.transformer_blocks[0].modules() if isinstance(m, nn.Linear)]
    plain = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
    packed = sum(weight.nbytes for weight in weights)
    assert read == plain - packed + packed // 4 * 34 // 32
    net.layer_streamer.close()


def write_zeros(path: Path, tensors: dict[str, tuple[int, str]]) -> None:
    """A GGUF file of tensors of two packed rows: by name, bytes of a row, and type."""
    writer = gguf.GGUFWriter(path, "diffusion")
    for name, (row, kind) in tensors.items():
        data = torch.zeros(2, row, dtype=torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Any]) -> None:
    entry = {"checkpoint_mapping_fn": convert}
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, SD3, entry)


@pytest.mark.slow
def test_what_diffusers_makes_by_arithmetic_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = original(tmp_path)

    def halve(config: Any, checkpoint: Any) -> Any:
        return {"proj_out.weight": next(iter(checkpoint.values())) / 2}

    converted(monkeypatch, halve)
    with pytest.raises(CheckpointError, match=r"'proj_out\.weight' of what is stored by arith"):
        stream(empty(SD3), path, device="cpu")


@pytest.mark.slow
def test_parts_that_are_packed_in_different_ways_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zeros(tmp_path / "two.gguf", {"a": (18, "Q4_0"), "b": (18, "IQ4_NL")})

    def join(config: Any, checkpoint: Any) -> Any:
        return {"proj_out.weight": torch.cat([checkpoint["a"], checkpoint["b"]])}

    converted(monkeypatch, join)
    with pytest.raises(CheckpointError, match="packed in different ways: IQ4_NL, Q4_0"):
        stream(empty(SD3), tmp_path / "two.gguf", device="cpu")


@pytest.mark.slow
def test_names_that_diffusers_does_not_know_are_told_with_its_reason(tmp_path: Path) -> None:
    save_file({"somebody.elses": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        stream(empty(SD3), tmp_path / "model.safetensors", device="cpu")
    assert "names are not those of SD3Transformer2DModel" in str(raised.value)
    assert "convert_sd3_transformer_checkpoint_to_diffusers cannot take it: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_its_own_names_of_which_one_lacks_are_told_as_ever(tmp_path: Path) -> None:
    with quiet():
        tensors = dict(tiny_diffuser(SD3).state_dict())
    lost = "transformer_blocks.1.attn.to_q.weight"
    del tensors[lost]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=lost):
        stream(empty(SD3), tmp_path / "model.safetensors", device="cpu")


class Plain(nn.Module):
    """Nobody's class."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_of_any_module_are_the_numbers_that_gguf_reads(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = Plain()
    path = write_packed(tmp_path / "m.gguf", dict(plain.state_dict()), "Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    for block in plain.blocks:
        rows = gguf.quants.quantize(block.weight.detach().numpy(), kind)
        block.weight.data = torch.from_numpy(gguf.quants.dequantize(rows, kind)).half().float()
    plain.to(dtype)
    with torch.device("meta"):
        net = Plain().to(dtype)
    model = stream(net, path, stacks=["blocks.{i}."], device="cpu")
    x = torch.randn(2, 64).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    model.layer_streamer.close()  # type: ignore[operator, union-attr]


@pytest.mark.slow
def test_a_packing_that_diffusers_does_not_unpack_is_named(tmp_path: Path) -> None:
    write_zeros(tmp_path / "m.gguf", {"blocks.0.weight": (66, "IQ2_XXS")})
    with torch.device("meta"):
        net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(256, 2, bias=False)])})
    with pytest.raises(ConfigError, match=r"IQ2_XXS of 'blocks\.0\.weight' cannot be streamed"):
        stream(net, tmp_path / "m.gguf", stacks=["blocks.{i}."], device="cpu")
