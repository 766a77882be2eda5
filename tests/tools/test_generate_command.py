"""The demo script: what it writes where, and how it ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from assets import (
    GOLDEN,
    smollm2,
    smollm2_metadata,
    tiny_checkpoint,
    tiny_model,
)
from byte_model import byte_model
from interpreters import COMMAND, run_script
from paths import ROOT
from safetensors.torch import save_file

from layer_streamer.llm.metadata import load_tokenizer
from layer_streamer.tools import cli

SCRIPT = [sys.executable, "-u", "-m", "layer_streamer", "generate"]
NUMBERS = "raw:1, 2, 3, 4, 5, 6,"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What main() sets in a process of its own stays out of this one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The subprocess needs no installation.
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Qwen2 directory, whose tokenizer loads in no time."""
    return byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def chatting(tmp_path):
    """One with the real model's tokenizer, and the model."""
    directory = tmp_path
    model = tiny_model("qwen2", vocab_size=49152, hidden_size=32, intermediate_size=32)
    tiny_checkpoint(directory, model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_metadata() / name, directory)
    return directory, model


def run(*arguments: object) -> subprocess.CompletedProcess:
    return run_script(COMMAND, "generate", *arguments)


def without_notes(err: bytes) -> list[str]:
    """Lines on stderr, but for what is said of every GGUF file of this architecture."""
    return [line for line in err.decode().splitlines() if line and "no sliding window" not in line]


def test_the_text_alone_is_on_stdout_and_the_summary_on_stderr(tmp_path):
    tokenizer = load_tokenizer(smollm2_metadata())
    golden = GOLDEN[NUMBERS]["new_ids"][:8]
    result = run(
        smollm2(), "--raw", "--prompt", NUMBERS.removeprefix("raw:"), "--max-new-tokens",
        len(golden), "--timeline", tmp_path / "pass.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == tokenizer.decode(golden)
    for part in ("8 tokens at ", "tokens/s", "8 passes, ", ", bound by ", "peak"):
        assert part in result.stderr
    assert json.loads((tmp_path / "pass.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_text_ends_cleanly_with_130():
    command = [*SCRIPT, str(smollm2()), "--prompt", "1, 2, 3,", "--raw", "--max-new-tokens", "4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert without_notes(err) == []


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_script_quietly():
    command = [*SCRIPT, str(smollm2()), "--prompt", "1, 2, 3,", "--raw", "--max-new-tokens", "4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(3)
        process.stdout.close()
        assert without_notes(process.stderr.read()) == []
    assert process.returncode == 0


def test_a_chat_answer_from_a_safetensors_directory_is_that_of_transformers(chatting, capfd):
    directory, model = chatting
    tokenizer = load_tokenizer(directory)
    chat = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert main(directory, "--prompt", "Hello", "--max-new-tokens", 12) == 0
    assert capfd.readouterr().out == text


def main(*arguments: object) -> int:
    return cli.main(["generate", *map(str, arguments)])


def test_a_prompt_from_stdin_loses_the_newline_of_its_line_only(tiny, capfd, monkeypatch):
    options = ("--raw", "--max-new-tokens", 4)
    assert main(tiny, "--prompt", "One\n two", *options) == 0
    expected = capfd.readouterr().out
    stdin = io.TextIOWrapper(io.BytesIO(b"One\n two\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(tiny, "--prompt", "-", *options) == 0
    assert capfd.readouterr().out == expected


def test_layers_are_found_by_the_pattern_that_is_named(tiny, capfd):
    options = ("--prompt", "Hi", "--max-new-tokens", 3)
    assert main(tiny, *options, "--layer-pattern", "model.layers.{i}.") == 0
    named = capfd.readouterr().out
    assert main(tiny, *options) == 0
    assert capfd.readouterr().out == named
    assert main(tiny, *options, "--layer-pattern", "blk.{i}.") == 2
    assert "no layers found (tried blk.{i}.)" in capfd.readouterr().err


def test_a_model_of_another_type_is_named_before_any_pattern_is_asked_for(tmp_path, capfd):
    save_file({"encoder.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert main(tmp_path, "--prompt", "Hi") == 2
    err = capfd.readouterr().err
    assert "mamba" in err and "layer_pattern" not in err


def test_a_seed_repeats_a_sampled_text(tiny, capfd):
    texts = []
    for seed in (3, 3, 4):
        options = ("--temperature", 1.0, "--seed", seed, "--max-new-tokens", 8)
        assert main(tiny, "--prompt", "Hi", *options) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_pool_settings_do_not_change_the_text(tiny, capfd):
    texts = set()
    for pools in ((0, 0, 0), (1, 2, 3), (5, 0, 1)):
        flags = zip(("--n-gpu", "--n-cpu-pinned", "--n-cpu"), pools, strict=True)
        options = [part for flag in flags for part in flag]
        assert main(tiny, "--prompt", "Hi", "--max-new-tokens", 6, *options) == 0
        texts.add(capfd.readouterr().out)
    assert len(texts) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_dtypes_generate(tiny, capfd, dtype):
    assert main(tiny, "--prompt", "Hi", "--max-new-tokens", 3, "--dtype", dtype) == 0
    assert "3 tokens at" in capfd.readouterr().err


def test_a_model_without_chat_template_continues_the_prompt_and_says_so(tiny, capfd, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    assert main(tmp_path, "--prompt", "Hi", "--max-new-tokens", 3) == 0
    out, err = capfd.readouterr()
    assert "no chat template" in err
    assert main(tmp_path, "--prompt", "Hi", "--max-new-tokens", 3, "--raw") == 0
    assert capfd.readouterr().out == out


def test_new_tokens_are_cut_to_what_the_context_has_room_for(tiny, capfd):
    prompt = "x" * 250
    assert main(tiny, "--raw", "--prompt", prompt, "--max-new-tokens", 50) == 0
    err = capfd.readouterr().err
    assert "room for 6 new tokens" in err and "6 tokens at" in err


def test_bias_and_penalties_change_the_answer(tiny, capfd):
    answers = []
    for options in (
        [],
        ["--presence-penalty", 2],
        ["--logit-bias", "7=100", "--logit-bias=9=-100"],
    ):
        assert main(tiny, "--raw", "--prompt", "Hi", "--max-new-tokens", 9, *options) == 0
        answers.append(capfd.readouterr().out)
    assert len({*answers}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/model.gguf", "--prompt", "Hi"], "/nowhere/model.gguf"),
        (["{tiny}"], "--prompt"),
        (["{tiny}", "--prompt", "Hi", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{tiny}", "--prompt", "Hi", "--device", "warp"], "--device warp"),
        (["{tiny}", "--prompt", "Hi", "--device", "cuda:0,warp"], "--device warp"),
        (["{tiny}", "--prompt", "Hi", "--device", "cpu,cuda:0"], "must be devices of one kind"),
        (["{tiny}", "--prompt", "Hi", "--max-new-tokens", "0"], "0: must be at least 1"),
        (["{tiny}", "--prompt", "Hi", "--temperature", "-1"], "temperature=-1.0"),
        (["{tiny}", "--prompt", "Hi", "--presence-penalty", "3"], "presence_penalty=3.0"),
        (["{tiny}", "--prompt", "Hi", "--logit-bias", "5"], "--logit-bias: invalid"),
        (["{tiny}", "--prompt", "Hi", "--logit-bias", "x=1"], "a token id of logit_bias='x'"),
        (["{tiny}", "--prompt", "Hi", "--logit-bias", "9999999=1"], "must be from 0 to"),
        (["{tiny}", "--prompt", "", "--raw"], "the prompt is empty"),
        (["{tiny}", "--prompt", "x" * 300, "--raw"], "300 tokens, the model's context is 256"),
        (["{gpt2}", "--prompt", "Hi"], "'gpt2' is not supported"),
        (["{noconfig}", "--prompt", "Hi"], "no config.json"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(tiny, capfd, tmp_path, arguments, message):
    for name in ("gpt2", "noconfig"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny / "model.safetensors", tmp_path / name)
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    places = {"tiny": tiny, "gpt2": tmp_path / "gpt2", "noconfig": tmp_path / "noconfig"}
    assert main(*(part.format(**places) for part in arguments)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory\nframe #0: <unknown>"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:20],
)
@pytest.mark.parametrize("place", ["opening.Runner.__init__", "passes.runner.Runner.forward"])
def test_what_the_machine_refuses_is_one_line(tiny, capfd, monkeypatch, place, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(f"layer_streamer.llm.{place}", refuse)
    assert main(tiny, "--prompt", "Hi") == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and type(error).__name__ in err


def test_a_generation_config_that_makes_no_sense_is_named_and_the_model_answers(
    tiny, capfd, tmp_path
):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    said = {"do_sample": True, "top_k": -1, "temperature": "0.6", "eos_token_id": ["2", None]}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert main(tmp_path, "--prompt", "Hi", "--max-new-tokens", 3, "--temperature", 0) == 0
    lines = capfd.readouterr().err.splitlines()
    named = [line for line in lines if str(tmp_path / "generation_config.json") in line]
    assert len(named) == 4 and all("not used" in line for line in named)


def test_a_truncated_checkpoint_is_an_error_that_names_the_file(tiny, capfd, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert main(tmp_path, "--prompt", "Hi") == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(path) in err


def test_help_needs_no_torch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *SCRIPT[2:], "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "layer-streamer generate MODEL --prompt" in result.stdout
    assert " torch" not in result.stderr


def test_with_budgets_the_text_is_the_same_and_nothing_is_said_to_be_streamed(chatting, capfd):
    options = [chatting[0], "--prompt", "Hi", "--max-new-tokens", 6]
    assert main(*options, "--read-mode", "buffered") == 0
    streamed = capfd.readouterr()
    assert main(*options) == 0
    assert "nothing streamed (all layers stay in memory)" in capfd.readouterr().err
    assert main(*options, "--device-budget", "auto") == 0
    resident = capfd.readouterr()
    assert resident.out == streamed.out
    assert "nothing streamed" in resident.err
    assert " GB streamed at " in streamed.err and "nothing streamed" not in streamed.err
    assert "slots and resident layers" in resident.err
    assert "slots and resident layers" not in streamed.err


def test_a_budget_that_means_nothing_is_one_clear_line(tiny, capfd):
    assert main(tiny, "--prompt", "Hi", "--device-budget", "lots") == 2
    assert "device_budget" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.gpu
def test_the_script_answers_on_a_gpu():
    result = run(smollm2(), "--prompt", "What is 2+2?", "--device", "cuda", "--dtype", "float32")
    assert result.stdout == "The answer to this classic math problem is 4.", result.stderr
    assert torch.cuda.is_available() and "on the GPU" in result.stderr
