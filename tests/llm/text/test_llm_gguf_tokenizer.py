"""Tokenizers of GGUF files: the token ids that llama.cpp gives."""

import random
from types import SimpleNamespace

import gguf_models
import pytest
from assets import tiny_model
from gguf_models import write_gguf
from tokenizers import Regex, pre_tokenizers
from tokenizers_made import LETTERS, SPACE

from layer_streamer import read_manifest
from layer_streamer.llm.metadata import load_tokenizer, metadata_directory
from layer_streamer.llm.text.gguf_tokenizer import added_ids, gguf_tokenizer, pre_tokenizer
from layer_streamer.llm.text.pre_tokenizers import PRE_TOKENIZERS, REFUSED

TEXT = "x1 = [12,345]\n\n\n  return  (a+b)\t// \u4e2d\u6587 don't CAN'T \u00c9t\u00e9  \r\n  "
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1


def array(values):
    return SimpleNamespace(load=lambda: list(values))


def byte_level(pre, *more, merges=("a b", "ab c", "\u0120 \u0120"), types=None, **fields):
    """Metadata of a byte-level tokenizer whose ids 0 to 2 are <unk>, <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *("".join(m.split()) for m in merges), *more]
    kinds = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3 - len(more)) + [CONTROL] * len(more)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": array(tokens),
        "tokenizer.ggml.token_type": array(kinds if types is None else kinds[:-1] + types),
        "tokenizer.ggml.merges": array(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def made(metadata):
    return gguf_tokenizer(metadata, lambda: pytest.fail("not byte-level"))


def words(pre, text=TEXT):
    cut = made(byte_level(pre)).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["a", " don", "'t", " CAN", "'", "T", " 1234", " ", "  x"]),
        ("smollm", ["a", " don", "'t", " CAN", "'", "T", " ", "1", "2", "3", "4", " ", "  x"]),
        ("llama-bpe", ["a", " don", "'t", " CAN", "'T", " ", "123", "4", "  ", " x"]),
        ("qwen2", ["a", " don", "'t", " CAN", "'T", " ", "1", "2", "3", "4", "  ", " x"]),
        ("tekken", ["a", " don", "'t", " CAN", "'T", " ", "1", "2", "3", "4", "  ", " x"]),
        ("gpt-4o", ["a", " don't", " CAN'T", " ", "123", "4", "  ", " x"]),
        ("deepseek-v3", ["a", " don", "'t", " CAN", "'T", " ", "123", "4", "  ", " x"]),
        ("deepseek-coder", ["a", " don", "'", "t", " CAN", "'", "T", " ", *"1234", "  ", " x"]),
        ("deepseek-llm", ["a", " don", "'", "t", " CAN", "'", "T", " ", "1234", "  ", " x"]),
        ("falcon", ["a", " don", "'", "t", " CAN", "'", "T", " ", "123", "4", " ", "  x"]),
        ("bloom", ["a", " don't", " CAN'T", " 1234", "  ", " x"]),
        ("viking", ["a", " don't", " CAN'T", " ", "1", "2", "3", "4", "  ", " x"]),
    ],
)  # fmt: skip
def test_each_name_cuts_words_in_its_way(pre, expected):
    found = words(pre, "a don't CAN'T 1234   x")
    if pre in ("gpt-2", "smollm", "falcon"):  # of which a run of spaces leaves one to the word
        expected = [*expected[:-2], "  ", " x"]
    assert found == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_way_to_cut_words_keeps_the_text(pre):
    tokenizer, draw = made(byte_level(pre)), random.Random(0)
    for text in (TEXT, "".join(draw.choices("ab1 .\n'\u4e2d\u00e9\U0001f600", k=60))):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_words_are_cut_as_transformers_does_where_it_knows_how():
    module = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for pre, pattern in module.GGUF_PRE_TOKENIZER_SPLITS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert words(pre) == [word for word, _ in split.pre_tokenize_str(TEXT)], pre


def test_a_missing_or_unknown_name_is_told_of_and_one_that_is_not_supported_refused():
    assert "names no tokenizer.ggml.pre" in pre_tokenizer(byte_level(None))[1]
    assert "'unheard-of' is unknown" in pre_tokenizer(byte_level("unheard-of"))[1]
    assert pre_tokenizer(byte_level("qwen2"))[1] is None
    for name in sorted(REFUSED):
        with pytest.raises(ValueError, match=f"'{name}': this way to cut words is not supported"):
            made(byte_level(name))


@pytest.mark.parametrize(
    ("model", "pre", "key", "bos", "eos"),
    [
        ("gpt2", "llama-bpe", {}, True, False),
        ("gpt2", "tekken", {}, True, False),
        ("gpt2", "smollm", {}, False, False),
        ("gpt2", "llama-bpe", {"add_bos_token": False}, False, False),
        ("gpt2", "qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("llama", None, {}, True, False),
        ("llama", "llama-bpe", {"add_bos_token": False}, False, False),
        ("t5", None, {}, False, True),
    ],
)
def test_bos_and_eos_are_added_where_llama_cpp_adds_them(model, pre, key, bos, eos):
    metadata = byte_level(pre, **key) | {"tokenizer.ggml.model": model}
    assert added_ids(metadata) == (bos, eos)
    if model == "gpt2":
        ids = made(metadata).encode("ab")
        assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)
        assert 1 not in made(metadata).encode("ab", add_special_tokens=False)


def test_a_file_that_names_no_bos_gets_none():
    metadata = byte_level("llama-bpe") | {"tokenizer.ggml.bos_token_id": None}
    assert len(made(metadata).encode("ab")) == 1


def test_a_word_that_the_vocabulary_has_is_one_token_where_that_is_the_rule():
    for pre, count in (("llama-bpe", 1), ("qwen2", 3)):
        metadata = byte_level(pre, "xyz", types=[NORMAL])
        assert len(made(metadata).encode("xyz", add_special_tokens=False)) == count


@pytest.mark.parametrize("token", ["<\uff5cUser\uff5c>", "<think>", " <x> "])
def test_special_tokens_of_any_spelling_are_found_and_have_the_files_ids(token):
    metadata = byte_level("deepseek-r1-qwen", token)
    tokenizer = made(metadata)
    last = len(metadata["tokenizer.ggml.tokens"].load()) - 1
    ids = tokenizer.encode(f"ab{token}ab", add_special_tokens=False)
    assert ids[1] == last and len(ids) == 3 and len(tokenizer) == last + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abab"


def test_a_token_of_the_user_is_found_but_shown():
    metadata = byte_level("qwen2", "<think>", types=[USER_DEFINED])
    tokenizer = made(metadata)
    ids = tokenizer.encode("ab<think>ab", add_special_tokens=False)
    assert len(ids) == 3 and tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>ab"


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_puts_a_space_before_a_text_unless_the_file_says_not_to(prefix):
    from transformers import LlamaTokenizer

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", SPACE, *LETTERS])}
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = gguf_tokenizer(metadata, lambda: LlamaTokenizer(vocab=vocab, merges=[]))
    space, a = vocab[SPACE], vocab["a"]
    before = [] if prefix is False else [space]
    assert tokenizer.encode("a") == [1, *before, a]
    assert tokenizer.encode(" a") == [1, *before, space, a]
    assert tokenizer.encode("a</s>a") == [1, *before, a, 2, *before, a]
    assert tokenizer.decode(tokenizer.encode(" a"), skip_special_tokens=True) == " a"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_what_is_kept_of_a_file_encodes_with_and_without_transformers(tmp_path, monkeypatch, pre):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_models, "PRE", pre)
    path, said = tmp_path / "tiny.gguf", []
    write_gguf(path, tiny_model("qwen2" if pre == "qwen2" else "llama"), tokenizer=True)
    tokenizer = load_tokenizer(metadata_directory(read_manifest(path), said.append))
    ids = tokenizer.encode(TEXT)
    assert ids == tokenizer._of_transformers().encode(TEXT)
    assert (ids[0] == 1) == (pre == "llama-bpe") and not any("pre" in note for note in said)


def test_an_unknown_name_is_told_of_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_models, "PRE", "unheard-of")
    path, said = tmp_path / "tiny.gguf", []
    write_gguf(path, tiny_model(), tokenizer=True)
    for _ in range(2):
        metadata_directory(read_manifest(path), said.append)
    assert sum("tiny.gguf: tokenizer.ggml.pre 'unheard-of'" in note for note in said) == 2
