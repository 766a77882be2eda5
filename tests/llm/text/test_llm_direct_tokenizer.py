"""A tokenizer without transformers does what transformers' own does."""

from __future__ import annotations

import functools
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf_models
import jinja2
import pytest
from assets import smollm2, smollm2_metadata, tiny_model
from byte_model import byte_tokenizer
from gguf_models import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import run_script
from transformers import AutoTokenizer

from layer_streamer import read_manifest
from layer_streamer.llm.hub import find_model
from layer_streamer.llm.metadata import FOR_SENTENCEPIECE, load_tokenizer, metadata_directory
from layer_streamer.llm.text.direct_tokenizer import (
    DESCRIPTION,
    DirectTokenizer,
    compile_template,
    describe,
)

CHATML = (
    "{% for message in messages %}\n  {{- '<|im_start|>' + message['role'] + '\n' "
    "+ message.content | trim + '<|im_end|>\n' }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = "
    "strftime_now('%d %b %Y') %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}"
    "{%- endif %}Today: {{ date_string }}\n{%- if tools is not none %}TOOLS{%- endif %}"
    "{% for message in messages %}{{ message | tojson }}{% endfor %}"
)
QWEN3 = (
    "{%- set ns = namespace(found=false, last=messages|length - 1) %}{%- for message in "
    "messages[::-1] %}{%- set ns.last = ns.last - 1 %}{%- if message.role == 'user' %}"
    "{%- set ns.found = true %}{%- break %}{%- endif %}{%- endfor %}{{ ns.found }} {{ ns.last }}"
    "{{ messages[-1].content.split('</think>')[-1].lstrip('\\n') }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{%- endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system: ' + eos_token) }}"
    "{% endif %}{% set kinds = dict(user='user', assistant='model') %}{% for m in messages %}"
    "{{ '<start_of_turn>' + kinds[m.role] }}\n{{ m.content is string }}{% endfor %}"
)
HOSTILE = (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ dict.__init__.__globals__ }}",
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ no_such_function() }}",
)
ASK = [{"role": "user", "content": " Why\n<b>is</b> it \u00e9? "}]
TALK = [*ASK, {"role": "assistant", "content": "<think>a</think>\n\nb"}, *ASK]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of bytes, as transformers saves it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return directory


def both(directory: Path, template: str | None = None) -> tuple[DirectTokenizer, Any]:
    """The same tokenizer, direct and of transformers."""
    theirs = AutoTokenizer.from_pretrained(directory)
    if template is not None:
        theirs.chat_template = template
        theirs.add_special_tokens({"bos_token": "\u0120", "eos_token": "!"})
    description = describe(theirs, directory)
    if template is not None and description is None:  # the special tokens are not in the file
        theirs.backend_tokenizer.save(str(directory / "tokenizer.json"))
        description = describe(theirs, directory)
    assert description is not None
    description = json.loads(json.dumps(description))
    return DirectTokenizer(directory, description, pytest.fail), theirs


def rendered(tokenizer: Any, messages: Any, **options: Any) -> str:
    """The text, or the error."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        )
    except jinja2.TemplateError as error:
        return type(error).__name__


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3, GEMMA])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"date_string": "now"}])
def test_a_template_is_rendered_as_transformers_renders_it(
    saved: Path, template: str, options: dict[str, Any]
) -> None:
    direct, theirs = both(saved, template)
    for messages in (ASK, TALK, SYSTEM):
        assert rendered(direct, messages, **options) == rendered(theirs, messages, **options)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_can_do_no_more_than_in_transformers(saved: Path, template: str) -> None:
    direct, theirs = both(saved, template)
    found = rendered(direct, ASK)
    assert found == rendered(theirs, ASK) and found in ("SecurityError", "UndefinedError")


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}),
        ([{"role": "user", "content": "Hi", "thinking": "Hm"}], {}),
        (ASK, {"tools": [{"name": "f"}]}),
        (ASK, {"continue_final_message": True}),
        (ASK, {"things": [1]}),
    ],
)
def test_what_transformers_does_more_with_goes_through_transformers(
    saved: Path, messages: Any, options: dict[str, Any]
) -> None:
    direct, theirs = both(saved, CHATML)
    asked: list[Any] = []
    direct._load = lambda: asked.append(1) or theirs
    with suppress(TypeError, ValueError):
        rendered(direct, messages, **options)
    assert asked == [1]


def test_a_template_with_a_tag_of_transformers_is_left_to_it(saved: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    theirs.chat_template = "{%- generation %}{{ messages[0].content }}{% endgeneration %}"
    assert describe(theirs, saved) is None


def test_a_tokenizer_that_is_not_what_its_file_says_is_left_to_transformers(saved: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    theirs.add_tokens(["<more>"])
    assert describe(theirs, saved) is None


@functools.cache
def real() -> tuple[DirectTokenizer, Any]:
    """The real model's tokenizer, direct and of transformers."""
    return both(smollm2_metadata())


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text(st.sampled_from(" ab\n\t<|im_end|>'\u00e9\U0001f600")))
def test_any_text_has_the_ids_and_any_ids_the_text_of_transformers(text: str) -> None:
    direct, theirs = real()
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    for special in (True, False):
        ids = direct.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        assert ids == theirs(text, add_special_tokens=special)["input_ids"]
        assert direct.decode(ids, **options) == theirs.decode(ids, **options)


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizers_of_gguf_files_are_direct_and_put_what_transformers_puts_before_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_bos: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "tiny.gguf"
    monkeypatch.setattr(gguf_models, "ADD_BOS", add_bos)
    write_gguf(path, tiny_model(), tokenizer=True)
    directory = metadata_directory(read_manifest(path), lambda _: None)
    direct, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert isinstance(direct, DirectTokenizer)
    assert direct.encode("ab ba") == theirs.encode("ab ba")
    assert direct.eos_token_id == theirs.eos_token_id


def test_what_else_is_asked_of_it_transformers_answers() -> None:
    tokenizer = load_tokenizer(smollm2_metadata())
    assert isinstance(tokenizer, DirectTokenizer)
    assert tokenizer.pad_token == "<|im_end|>" and len(tokenizer) == 49152
    assert set(tokenizer("Hello")) == {"input_ids", "attention_mask"}
    assert not hasattr(tokenizer, "no_such_thing")


def test_a_prompt_is_encoded_without_importing_transformers() -> None:
    smollm2_metadata()
    program = (
        "import sys; from layer_streamer.llm.opening import Model;"
        "from layer_streamer.llm.text.tokenizer import chat_ids;"
        "chat_ids(Model.read(sys.argv[1], print).tokenizer, 'Hello');"
        "sys.exit('transformers' in sys.modules)"
    )
    assert run_script(program, smollm2()).returncode == 0


def test_a_directory_without_the_description_is_read_through_transformers(saved: Path) -> None:
    assert not (saved / DESCRIPTION).exists()
    assert not isinstance(load_tokenizer(saved), DirectTokenizer)


PACKAGES = [
    "tokenizers", "jinja2", "transformers", "huggingface_hub", "sentencepiece", "google.protobuf",
]  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing_is_an_error_that_says_how_to_install_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'layer-streamer\[llm\]'"):
        if package == "tokenizers":
            DirectTokenizer(saved, {}, pytest.fail)
        elif package == "jinja2":
            compile_template(CHATML)
        elif package == "huggingface_hub":
            find_model("owner/name")
        elif package in FOR_SENTENCEPIECE:
            (tmp_path / "tokenizer.model").touch()
            load_tokenizer(tmp_path)
        else:
            load_tokenizer(saved)
