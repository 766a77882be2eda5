"""A real model, quantized: what it loses. And what large ones take."""

import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import make_checkpoint
import pytest
import torch
from assets import one_torch_thread, relative_error, smollm2
from forward import open_forward
from paths import ROOT
from quantizing import run, weights
from shapes import SHAPES
from transformers import AutoModelForCausalLM

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.opening import Model
from layer_streamer.llm.quantize.perplexity import perplexity
from layer_streamer.llm.text.tokenizer import raw_ids
from layer_streamer.tools import quantize_command as quantize

CPU = torch.device("cpu")
EVALUATION = ROOT / "tests/data/evaluation.txt"


def read(path) -> Model:
    return Model.read(path, lambda _: None)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """The beginning of every topic of Python's own help: nothing that the evaluation is about."""
    path = tmp_path_factory.mktemp("texts") / "help.txt"
    topics = pydoc_data.topics.topics
    path.write_text("\n".join(topics[name][:1200] for name in sorted(topics)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ids():
    found = raw_ids(read(smollm2()).tokenizer, EVALUATION.read_text(encoding="utf-8"))
    assert len(found) >= 2000
    return found


@pytest.fixture(scope="module")
def original(ids) -> float:
    with one_torch_thread():
        return perplexity(read(smollm2()), ids, CPU)


def loss(out, ids, original: float, *options: object) -> float:
    """By how much of it the perplexity grows."""
    with one_torch_thread():
        assert run(smollm2(), out, *options) == 0
        return perplexity(read(out), ids, CPU) / original - 1


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "32"])
def test_eight_bits_lose_nothing_to_speak_of(tmp_path, ids, original, group):
    assert abs(loss(tmp_path / "out", ids, original, "--bits", 8, "--group", group)) < 0.005


FOUR = ("--bits", 4, "--group", 32)


@pytest.fixture(scope="module")
def blind(tmp_path_factory, ids, original) -> float:
    """The loss without calibration."""
    return loss(tmp_path_factory.mktemp("blind") / "out", ids, original, *FOUR)


@pytest.mark.slow
def test_four_bits_without_calibration_still_make_sense(blind):
    assert 0.05 < blind < 0.3


@pytest.mark.slow
def test_four_bits_with_calibration_lose_little_and_less_than_without(
    tmp_path, ids, original, calibration, blind
):
    aware = loss(tmp_path / "aware", ids, original, *FOUR, "--calibrate", calibration)
    assert aware < 0.12 and aware < 0.75 * blind
    question = [{"role": "user", "content": "What is 2+2?"}]
    with StreamingEngine(tmp_path / "aware", device="cpu", max_length=64) as engine:
        assert "4" in engine.generate(question, max_new_tokens=20, temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_it_with_weights_equal_to_ours(tmp_path, bits, dtype):
    out, prompt = tmp_path / "out", [504, 3575, 282, 4649, 314]
    assert run(smollm2(), out, "--bits", bits, "--dtype", dtype) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits[0].float()
    found = theirs.state_dict()
    for name, expected in weights(out, bits).items():
        assert torch.equal(found[name], expected.to(getattr(torch, dtype))), name
    if dtype == "float32":
        with open_forward(out, load_config(out)) as forward:
            assert relative_error(forward(prompt), logits) <= 1e-5


MEASURED = """
import resource, sys
import torch
from pathlib import Path
from layer_streamer.llm.opening import Model
from layer_streamer.llm.quantize.grouping import choose_groups
from layer_streamer.llm.quantize.job import Job, quantize
from layer_streamer.llm.quantize.layers import Recipe
from layer_streamer.llm.quantize.scales import Rounding
from layer_streamer.llm.threads import leave_a_core

leave_a_core()
model = Model.read(sys.argv[1], print)
recipe = Recipe(Rounding(8, torch.bfloat16), choose_groups(model.config, None))
job = Job(model=model, recipe=recipe, out=Path(sys.argv[2]), device=torch.device("cpu"),
          calibration=range(int(sys.argv[3])))
quantize(job, lambda _: None, lambda _: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_nbytes(made: Path, out: Path, tokens: int) -> int:
    """Memory of a process of its own that quantizes a model, calibrated with so many tokens."""
    command = [sys.executable, "-c", MEASURED, str(made), str(out), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_quantizing_the_shape_of_a_7b_model_takes_less_than_4_gib(tmp_path, monkeypatch):
    """Two layers of it: more go through the same two slots. Half of its vocabulary: that is read
    in pieces. Of the calibration text, all tokens are kept and one window is computed with.
    """
    made, tokens = tmp_path / "in", 1024
    monkeypatch.setitem(SHAPES, "qwen2.5-7b", SHAPES["qwen2.5-7b"] | {"vocab_size": 65536})
    assert make_checkpoint.main([str(made), "--shape", "qwen2.5-7b", "--layers", "2"]) == 0
    peak = peak_nbytes(made, tmp_path / "out", tokens)
    others = (quantize.CALIBRATION_TOKENS - tokens) * 3584 * 4
    assert 1 << 30 < peak < (4 << 30) - others, peak


@pytest.mark.slow
def test_more_layers_of_a_mixture_take_no_more_memory(tmp_path, monkeypatch):
    """A layer is 0.3 GB, of which two are held, and half of one as it is written."""
    smaller = {"vocab_size": 4096, "num_experts": 32}
    monkeypatch.setitem(SHAPES, "qwen3-30b-a3b", SHAPES["qwen3-30b-a3b"] | smaller)
    peaks = []
    for layers in (2, 5):
        made = tmp_path / str(layers)
        arguments = ["--shape", "qwen3-30b-a3b", "--layers", str(layers)]
        assert make_checkpoint.main([str(made), *arguments]) == 0
        peaks.append(peak_nbytes(made, tmp_path / f"out{layers}", 64))
    layer = (made / "model.safetensors").stat().st_size / 5
    assert 2e8 < layer < 4e8 and peaks[1] < peaks[0] + layer / 2, peaks
    assert peaks[1] < 3 * layer + (1 << 30), peaks
