"""A chat with a model that the engine does not compute, through the command line."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import interrupter
import pytest
import torch
import transformers
from byte_model import VOCABULARY, byte_model, byte_tokenizer
from paths import ROOT
from recipes import quiet

from layer_streamer.tools import chat_command, voice
from layer_streamer.tools.cli import main
from layer_streamer.tools.module_answers import ModuleChat, open_answers

OPTIONS = ("--device", "cpu", "--max-new-tokens", "12", "--temperature", "0")
GOING_ON = "going on by the model's own class"


def gpt2(folder: Path, **changes: Any) -> Path:
    """A type that the engine lacks, which ends no text by itself, with a tokenizer of bytes."""
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 256}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, **(sizes | changes)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What main() sets in a process of its own stays out of this one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with quiet():
        yield


def answers(folder: Path, *questions: str) -> list[str]:
    """What transformers answers with the model resident, turn by turn."""
    tokenizer = byte_tokenizer()
    plain: Any = transformers.GPT2LMHeadModel.from_pretrained(folder)
    messages, found = list[Any](), list[str]()
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        said = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def chat(
    monkeypatch: pytest.MonkeyPatch, folder: Path, typed: str, *options: str
) -> tuple[int, bytes]:
    """Exit code, and what was written."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    monkeypatch.setattr(voice, "write", lambda text: written.write(text.encode()))
    return main(["chat", str(folder), *OPTIONS, *options]), written.getvalue()


def test_a_model_that_the_engine_lacks_answers_turn_after_turn_as_transformers_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    want = "".join(f"{text}\n" for text in answers(folder, "Hello", "And then?"))
    capsys.readouterr()
    code, out = chat(monkeypatch, folder, "Hello\nAnd then?\n")
    err = capsys.readouterr().err
    assert (code, out.decode()) == (0, want)
    assert [line for line in err.splitlines() if GOING_ON in line and "'gpt2'" in line]
    assert err.count("\n") == 2 + 2  # where the commands are, and of each answer that it was ended


@pytest.mark.slow
def test_from_a_shell_the_text_alone_is_on_stdout(folder: Path) -> None:
    want = "".join(f"{text}\n" for text in answers(folder, "Hello"))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-m", "layer_streamer", "chat", str(folder), *OPTIONS],
        input=b"Hello\n", capture_output=True, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.decode() == want
    assert b"Traceback" not in ran.stderr and GOING_ON.encode() in ran.stderr


def test_ctrl_c_ends_an_answer_and_the_next_one_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    want = answers(folder, "one two three")
    monkeypatch.setattr("sys.stdin", io.StringIO("one two three\n/new\none two three\n"))
    monkeypatch.setattr(voice, "write", write)
    assert main(["chat", str(folder), *OPTIONS]) == 0
    text, whole = "".join(pieces), f"{want[0]}\n"
    assert text.endswith(f"\n{whole}")
    first = text.removesuffix(f"\n{whole}")
    assert want[0].startswith(first) and len(first) < len(want[0])
    assert "(ended)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stride", [211])
def test_after_an_interrupt_at_any_line_of_the_library_the_next_answer_is_right(
    folder: Path, stride: int
) -> None:
    parser = argparse.ArgumentParser()
    chat_command.add_arguments(parser)
    args = parser.parse_args([str(folder), *OPTIONS])
    (want,) = answers(folder, "Hello")
    number, fired, rounds = stride // 2, True, 0
    with open_answers(args) as opened:
        while fired:
            some = ModuleChat(opened, lambda _: None)
            with suppress(KeyboardInterrupt), interrupter.Interrupter(number, "line") as at:
                some.answer("Hello")
            sys.settrace(None)
            fired = at.fired
            again = ModuleChat(opened, lambda _: None)
            assert again.answer("Hello") and again.messages[1]["content"] == want
            number, rounds = number + stride, rounds + 1
    assert rounds > 10


def test_a_conversation_that_fills_the_context_says_so_and_the_chat_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, out = chat(monkeypatch, folder, f"{'x' * 228}\nHi\n/new\n{'y' * 300}\nHi\n")
    err = capsys.readouterr().err
    assert code == 0 and out.decode().endswith(f"{answers(folder, 'Hi')[0]}\n")
    assert "(ended: the conversation fills its 256 tokens, /new starts over)" in err
    assert err.count("error: the conversation does not fit any more") == 2


def test_without_a_chat_template_the_conversation_is_continued_and_that_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    gpt2(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    code, out = chat(monkeypatch, tmp_path, "Hi\n")
    assert code == 0 and "no chat template" in capsys.readouterr().err
    plain: Any = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = byte_tokenizer()("Hi", return_tensors="pt").input_ids
    said = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.decode() == byte_tokenizer().decode(said[0, 2:], skip_special_tokens=True) + "\n"


def test_a_model_that_the_engine_computes_is_the_engines_unless_modules_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    byte_model(tmp_path)
    opened: list[str] = []
    for name in ("open_engine", "open_answers"):
        real = getattr(chat_command, name)

        def spy(*args: Any, name: str = name, real: Any = real) -> Any:
            opened.append(name)
            return real(*args)

        monkeypatch.setattr(chat_command, name, spy)
    found = [chat(monkeypatch, tmp_path, "Hi\n", *more) for more in ((), ("--modules",))]
    assert opened == ["open_engine", "open_answers"]
    assert found[0] == found[1] and found[0][0] == 0
    assert GOING_ON not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("""{"model_type": "bert", "architectures": ["BertForMaskedLM"]}""", "an encoder, which"),
        ("""{"model_type": "warp", "architectures": ["WarpForCausalLM"]}""", "'warp' is not"),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["generate", "--prompt", "Hi"]])
def test_what_transformers_does_not_answer_for_either_is_the_engines_error(
    folder: Path, tmp_path: Path, capsys: Any, command: list[str], config: str, words: str
) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    assert main([command[0], str(tmp_path), *command[1:]]) == 2
    err = capsys.readouterr().err
    assert words in err and "--modules" not in err and err.count("\n") == 1


def test_generate_names_modules_where_they_would_answer(folder: Path, capsys: Any) -> None:
    assert main(["generate", str(folder), "--prompt", "Hi"]) == 2
    err = capsys.readouterr().err
    assert "'gpt2' is not supported" in err and "--modules" in err and err.count("\n") == 1


def test_options_of_the_engine_are_refused_before_anything_is_opened(
    folder: Path, capsys: Any
) -> None:
    assert main(["chat", str(folder), "--kv", "host"]) == 2
    assert "--kv: the engine's, which --modules does without" in capsys.readouterr().err
