"""Floats of sixteen bits on a processor: multiplied as they lie in their file, not cast before."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import relative_error, tiny_checkpoint
from zoo import IDS, reference, zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.host_kernels import products
from layer_streamer.llm.host_kernels.build import COMPILERS
from layer_streamer.llm.weights.arithmetic import Reproducible, project
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.llm.weights.packed import FLOATS, Packed

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler"
)
CPU = torch.device("cpu")
SIXTEEN = {kind: dtype for kind, dtype in FLOATS.items() if dtype.itemsize == 2}
LONG = (IDS * 3)[: products.MOST_TOKENS + 9]
"""A prompt of more tokens than kernels take."""
MODELS = ("llama-biases", "gemma3_text", "qwen2_moe", "gpt_oss")


def checkpoint(directory: Path, name: str, dtype: torch.dtype, **changes: Any) -> Any:
    """Of a model in this dtype; the same in float32, for transformers."""
    model = zoo_model(name, **changes)
    for kind in (dtype, torch.float32):
        for parameter in model.parameters():  # and no buffer: frequencies are not to be rounded
            parameter.data = parameter.data.to(kind)
        if kind == dtype:
            tiny_checkpoint(directory, model)
    return model


def opened(path: Path, **options: Any) -> StreamingEngine:
    return StreamingEngine(path, **{"device": "cpu", "max_length": 128, **options})


def logits(engine: StreamingEngine, ids: list[int], prompt: int) -> torch.Tensor:
    """Of the prompt in one pass, then of one token at a time."""
    runner = engine._runner
    row = runner.kv.rows.add(len(ids))
    pieces = [ids[:prompt], *([token] for token in ids[prompt:])]
    return torch.cat([runner.forward([(row, piece)], every_position=True) for piece in pieces])


def handed_out(engine: StreamingEngine) -> list[torch.Tensor]:
    """All tensors of a pass."""
    found: list[torch.Tensor] = []
    engine.streamer.run_pass(
        torch.zeros(1), lambda x, tensors, i: found.extend(tensors.values()) or x
    )
    return found


@pytest.mark.parametrize("dtype", SIXTEEN.values(), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_sixteen_bits_gives_the_logits_of_its_weights_in_float32(tmp_path, name, dtype):
    model = checkpoint(tmp_path, name, dtype)
    with opened(tmp_path) as engine:
        assert {tensor.dtype for tensor in handed_out(engine)} == {dtype}
        found = logits(engine, LONG, len(LONG) - 6)
    assert relative_error(found, reference(model, LONG, len(LONG) - 6)) <= 1e-5


def test_a_pass_looks_at_the_pages_of_the_file_and_nothing_is_copied(tmp_path):
    checkpoint(tmp_path, "llama", torch.bfloat16)
    (file,) = tmp_path.glob("*.safetensors")
    with opened(tmp_path) as engine:
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("the system does not tell what is mapped")
        lines = [line for line in maps.read_text().splitlines() if line.endswith(str(file))]
        mapped = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
        for tensor in handed_out(engine):
            assert any(start <= tensor.data_ptr() < end for start, end in mapped)


def test_it_takes_no_more_memory_than_the_file_has(tmp_path):
    checkpoint(tmp_path / "as stored", "llama", torch.bfloat16)
    checkpoint(tmp_path / "wide", "llama", torch.float32)
    sizes = []
    for folder in ("as stored", "wide"):
        with opened(tmp_path / folder) as engine:
            sizes.append(sum(size.device_nbytes for size in engine.plan.streamer.sizes))
    assert 2 * sizes[0] <= 1.01 * sizes[1]


def test_layers_that_do_not_stay_are_not_cast_either(tmp_path):
    model = checkpoint(tmp_path, "llama", torch.float16)
    with opened(tmp_path, n_gpu=1, read_mode="buffered") as engine:
        assert {tensor.dtype for tensor in handed_out(engine)} == {torch.float16}
        found = logits(engine, IDS, 9)
    assert relative_error(found, reference(model, IDS, 9)) <= 1e-5


def test_experts_on_demand_are_multiplied_as_they_are_stored(tmp_path):
    model = checkpoint(tmp_path, "qwen2_moe", torch.bfloat16)
    with opened(tmp_path, experts="demand", expert_slots=8) as engine:
        found = logits(engine, IDS, 9)
    assert relative_error(found, reference(model, IDS, 9)) <= 1e-5


def dtypes(path: Path, **options: Any) -> set[torch.dtype]:
    with opened(path, **options) as engine:
        return {tensor.dtype for tensor in handed_out(engine)}


def test_without_compiled_kernels_floats_are_cast_once_when_they_are_loaded(tmp_path, monkeypatch):
    checkpoint(tmp_path, "llama", torch.bfloat16)
    monkeypatch.setattr(products, "library", lambda: None)
    assert dtypes(tmp_path) == {torch.float32}


def test_where_a_width_is_none_that_kernels_take_floats_are_cast_once(tmp_path):
    checkpoint(tmp_path, "llama", torch.bfloat16, intermediate_size=72)
    assert dtypes(tmp_path) == {torch.float32}


def test_another_dtype_than_float32_is_what_floats_are_cast_to(tmp_path):
    checkpoint(tmp_path, "llama", torch.bfloat16)
    assert dtypes(tmp_path, dtype=torch.float16) == {torch.float16}


def test_the_same_bits_come_out_whoever_shares_a_pass_of_floats_as_stored(tmp_path):
    checkpoint(tmp_path, "llama", torch.bfloat16)
    with opened(tmp_path, reproducible=True) as engine:
        assert {tensor.dtype for tensor in handed_out(engine)} == {torch.bfloat16}
        whole = logits(engine, IDS, len(IDS))
    with opened(tmp_path, reproducible=True) as engine:
        assert torch.equal(logits(engine, IDS, 3), whole)


def matrix(kind: str) -> Packed:
    random = torch.Generator().manual_seed(1)
    weight_ND = torch.randn(40, 96, generator=random).to(FLOATS[kind])
    return Packed(format=kind, rows=40, width=96, parts={"weight": weight_ND})


@pytest.mark.parametrize("kind", SIXTEEN)
def test_a_reproducible_product_is_the_same_for_any_number_of_tokens(kind):
    packed, x_TD = matrix(kind), torch.randn(2 * products.MOST_TOKENS + 1, 96)
    unpacker = Unpacker(CPU, torch.float32, Widest(96, frozenset([(kind, True)])))
    arithmetic = Reproducible(CPU)
    whole = arithmetic.project(x_TD, packed, unpacker)
    for count in (1, 2, 7, products.MOST_TOKENS, products.MOST_TOKENS + 1):
        assert torch.equal(arithmetic.project(x_TD[:count], packed, unpacker), whole[:count])


@pytest.mark.parametrize("count", [1, 8, 9, products.MOST_TOKENS + 1])
@pytest.mark.parametrize("kind", SIXTEEN)
def test_inputs_of_the_weights_own_dtype_are_summed_up_in_float32_and_rounded_once(kind, count):
    packed, dtype = matrix(kind), FLOATS[kind]
    x_TD = torch.randn(count, 96).to(dtype)
    exact = x_TD.double() @ packed.parts["weight"].double().t()
    found = project(x_TD, packed, Unpacker(CPU, dtype, Widest()))
    assert found.dtype == dtype
    terms = x_TD.double().abs() @ packed.parts["weight"].double().abs().t()
    rounding = torch.finfo(dtype).eps / 2
    assert ((found - exact).abs() <= rounding * exact.abs() + 1e-6 * terms).all()
