"""host_layers="auto" in the engine: by what the processor makes of the checkpoint's own formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from fake_device import FakeDevice, named_twice, near_device
from gguf_models import write_gguf
from gpt_oss_models import write_blocks
from packed_models import write_packed
from packings import PACKINGS
from probing import TINY
from zoo import zoo_model

from layer_streamer import ProductRate
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.host_kernels import products as host_products
from layer_streamer.llm.host_kernels.library import library
from layer_streamer.llm.on_host import products
from layer_streamer.llm.on_host.products import Kind, Rates, kinds_of, measure_rates
from layer_streamer.llm.opening import Model
from layer_streamer.llm.weights.arithmetic import project
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.machine.products import load_products
from layer_streamer.measuring import products as measuring

GIVEN: dict[str, Any] = {"device": "cpu", "max_length": 64, "kv_tokens": 512}
Measured = Mapping[str, tuple[ProductRate, ...]]


@pytest.fixture(autouse=True)
def own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()  # from the usual cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "CONFIG", TINY)


@pytest.fixture
def near() -> Iterator[None]:
    with near_device():
        yield


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen2", max_position_embeddings=2048)
    return tiny_checkpoint(tmp_path_factory.mktemp("floats"), model)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of seven formats."""
    path = tmp_path_factory.mktemp("mixed") / "tiny.gguf"
    write_gguf(path, zoo_model("llama"))
    return path


def read(path: Path) -> Model:
    return Model.read(path, lambda note: None)


def kinds(model: Model, cast: torch.dtype | None = None) -> dict[str, Kind]:
    found = kinds_of(model.names, model.manifest, model.config, cast)
    return {kind.stored.format: kind for kind in found}


def rates_of(model: Model) -> Rates:
    cpu = torch.device("cpu")
    return measure_rates(model.names, model.manifest, model.config, [cpu], None)


def told(patch: pytest.MonkeyPatch, rate: Callable[[str], float], copies: float = 50e9) -> None:
    """Have the record say how fast each format is."""

    def product_rates(devices: Any, names: Any) -> Measured:
        return {name: tuple(ProductRate(1, rate(name), copies) for _ in devices) for name in names}

    patch.setattr(products, "product_rates", product_rates)


def project_one(kind: Kind) -> torch.Tensor:
    stored = kind.stored
    widest = Widest.of([(stored.format, stored.width, stored.ordered)])
    x_TD = torch.ones(1, stored.width)
    packed = kind.packed(kind.tensors())
    return project(x_TD, packed, Unpacker(torch.device("cpu"), torch.float32, widest))


@pytest.mark.parametrize("packing", PACKINGS)
def test_made_up_matrices_of_every_packing_are_multiplied_as_passes_multiply_them(
    tmp_path: Path, packing: str
) -> None:
    model = read(write_packed(tmp_path / "packed", zoo_model("llama-biases"), packing))
    (kind,) = kinds(model).values()
    y_TN = project_one(kind)
    assert y_TN.shape == (1, kind.stored.rows) and torch.isfinite(y_TN).all()
    assert not ((y_TN != 0) & (y_TN.abs() < 1e-30)).any(), "denormal numbers"
    tensors = kind.tensors()
    assert sum(tensor.nbytes for tensor in tensors.values()) == kind.nbytes
    if packing != "fp8-blocks":  # blocks at the edges are cut off
        largest = max(spec.nbytes for spec in kind.specs.values())
        assert largest <= kind.nbytes < 2 * largest


def test_each_format_of_a_file_has_its_share_of_what_a_token_is_multiplied_by(mixed: Path) -> None:
    model = read(mixed)
    found = kinds(model)
    assert set(found) == {"Q4_1", "Q8_0", "F16", "BF16", "Q5_0", "F32"}
    every = [one for layer in model.names.layers for one in layer.values()]
    assert sum(kind.weights for kind in found.values()) == sum(s.rows * s.width for s in every)
    for kind in found.values():
        assert torch.isfinite(project_one(kind)).all()
        largest = max(s.rows * s.width for s in every if s.format == kind.stored.format)
        assert kind.stored.rows * kind.stored.width == largest


def test_a_token_is_multiplied_by_few_of_a_mixtures_experts(tmp_path: Path) -> None:
    path = tmp_path / "mixture.gguf"
    write_gguf(path, zoo_model("qwen3_moe"))
    model = read(path)
    experts = model.config.experts
    assert experts is not None and experts.per_token < experts.count
    kind = kinds(model)["Q5_0"]  # of experts alone
    assert kind.stored.expert is not None
    rows = [s.rows * s.width for layer in model.names.layers for s in layer.values()
            if s.format == "Q5_0"]  # fmt: skip
    assert kind.weights == pytest.approx(sum(rows) * experts.per_token / experts.count)
    assert torch.isfinite(project_one(kind)).all()
    assert kind.nbytes * 32 == kind.stored.rows * kind.stored.width * 22


def test_of_a_format_the_largest_matrix_is_measured(floats: Path) -> None:
    model = read(floats)
    (kind,) = kinds(model).values()
    sizes = {s.rows * s.width for layer in model.names.layers for s in layer.values()}
    assert kind.stored.rows * kind.stored.width == max(sizes) > min(sizes)


def test_an_experts_matrix_that_is_every_second_row_of_a_tensor_has_no_more_bytes_than_its_own(
    tmp_path: Path,
) -> None:
    kind = kinds(read(write_blocks(tmp_path / "blocks", zoo_model("gpt_oss"))))["mxfp4"]
    assert kind.stored.expert is not None
    packed = kind.packed(kind.tensors())
    assert kind.nbytes == sum(part.numel() * part.itemsize for part in packed.parts.values())
    assert torch.isfinite(project_one(kind)).all()


def test_the_rate_of_a_model_is_that_of_its_bytes_over_the_time_that_all_formats_take(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, by_format = read(mixed), {"Q4_1": 7e9, "Q8_0": 16e9, "F32": 2e9}
    told(monkeypatch, lambda name: by_format.get(name.partition(" ")[0], 5e9))
    rates = rates_of(model)
    seconds = sum(
        kind.weights * kind.nbytes / (kind.stored.rows * kind.stored.width)
        / by_format.get(kind.stored.format, 5e9)
        for kind in kinds(model).values()
    )  # fmt: skip
    nbytes = sum(t.nbytes for layer in model.manifest.layers for t in layer.tensors.values())
    assert rates.products == pytest.approx(nbytes / seconds)
    assert rates.links == pytest.approx((50e9,))
    assert rates.kinds["Q8_0"] == 16e9 and rates.kinds["F32 by torch"] == 2e9


def test_floats_that_are_cast_where_they_are_handed_out_are_measured_so(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kinds(read(mixed), torch.bfloat16)
    assert {kind.label for kind in found.values()} >= {"BF16", "F16 as bfloat16", "F32 as bfloat16"}
    assert found["F16"].packed(found["F16"].tensors()).parts["weight"].dtype == torch.bfloat16
    assert found["F16"].said == "F16 as bfloat16 by torch"


def test_formats_are_measured_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(3)
    monkeypatch.setattr(measuring, "open_devices", lambda names: [device])
    first = rates_of(read(mixed))
    assert set(first.kinds) == {"Q4_1", "Q8_0", "F16", "BF16", "Q5_0", "F32 by torch"}
    device.drain()
    assert not device.errors and not device._pinned
    monkeypatch.setattr(measuring, "measure_beside", lambda *given: pytest.fail("again"))
    assert rates_of(read(mixed)) == first


def test_without_a_compiler_rates_are_those_of_plain_torch(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with near_device():
        compiled = rates_of(read(mixed))
        for module in (products, host_products):
            monkeypatch.setattr(module, "library", lambda: None)
        plain = rates_of(read(mixed))
    assert set(plain.kinds) == {f"{label.partition(' ')[0]} by torch" for label in compiled.kinds}
    assert len(load_products("cpu", torch.get_num_threads())) == 6 + 5


@pytest.mark.parametrize(("rate", "count"), [(50e9, 2), (150e9, 2), (1e9, 0)])
def test_auto_keeps_as_many_as_end_with_those_that_stream_and_the_plan_says_by_which_rates(
    near: None, floats: Path, monkeypatch: pytest.MonkeyPatch, rate: float, count: int
) -> None:
    told(monkeypatch, lambda name: rate)
    with StreamingEngine(floats, host_layers="auto", **GIVEN) as engine:
        there = engine.streamer.plan.host_layers
        assert len(there) == count and set(there) <= set(engine.plan.host_layers)
        assert engine.generate([5, 6, 7], max_new_tokens=3, return_details=True).error is None
        table = str(engine.plan)
    assert f"computed in host memory, in passes of few tokens: {count} of 3 layers" in table
    assert f"multiplies F32 by torch {rate / 1e9:.2f} GB/s, beside 50.00 GB/s of copies" in table
    assert ("a token: links" in table) == bool(count)


@pytest.mark.parametrize(("devices", "count"), [(["cpu"], 2), (["cpu", "cpu"], 1)])
def test_over_several_devices_the_links_count_together(
    near: None, floats: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], count: int
) -> None:
    told(monkeypatch, lambda name: 25e9, 25e9)
    options = GIVEN | {"device": devices, "host_layers": "auto"}
    with named_twice(), StreamingEngine(floats, **options) as engine:
        assert len(engine.streamer.plan.host_layers) == count
        assert f"beside {25 * len(devices)}.00 GB/s of copies" in str(engine.plan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_budget": "64MiB"}, "0 of 3 layers (no layer streams)"),
        ({"n_cpu_pinned": 1}, "0 of 3 layers (what holds passes up is the disk)"),
        ({"reproducible": True}, "0 of 3 layers (they do not go with reproducible=True)"),
        ({"kv_int8": True, "kv": "host"}, "0 of 3 layers (they do not go with kv_int8=True)"),
    ],
)
def test_where_nothing_could_be_spared_nothing_is_measured(
    near: None, floats: Path, monkeypatch: pytest.MonkeyPatch, options: Any, words: str
) -> None:
    monkeypatch.setattr(products, "product_rates", lambda *given: pytest.fail("measured"))
    with StreamingEngine(floats, host_layers="auto", **GIVEN, **options) as engine:
        assert not engine.streamer.plan.host_layers and words in str(engine.plan)


def test_on_a_cpu_auto_is_no_layer_and_says_nothing(
    floats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "product_rates", lambda *given: pytest.fail("measured"))
    with StreamingEngine(floats, host_layers="auto", **GIVEN) as engine:
        assert "computed in host memory" not in str(engine.plan)


def test_a_number_that_was_named_is_in_the_plan_without_rates(near: None, floats: Path) -> None:
    with StreamingEngine(floats, host_layers=1, **GIVEN) as engine:
        lines = str(engine.plan).splitlines()
    assert lines[-1] == "computed in host memory, in passes of few tokens: 1 of 3 layers"
