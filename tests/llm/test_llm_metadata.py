import errno
import json
import shutil
from types import MappingProxyType, SimpleNamespace

import gguf_models
import pytest
from assets import TINY, smollm2, smollm2_metadata, tiny_checkpoint, tiny_model
from gguf_models import write_gguf
from tokenizers_made import byte_level

from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.llm import metadata
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.metadata import load_config, load_tokenizer, metadata_directory
from layer_streamer.llm.models.config import UnsupportedModelError
from layer_streamer.llm.models.gguf_config import gguf_config


def quiet(_: str) -> None:
    pass


@pytest.fixture
def stub_build(monkeypatch, tmp_path):
    """An empty cache, and a build that only counts its runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builds = []

    def build(manifest, directory):
        builds.append(directory)
        directory.mkdir()

    monkeypatch.setattr(metadata, "_write_tokenizer", build)
    return builds


def test_the_real_models_config_comes_from_its_gguf_metadata():
    config = load_config(smollm2_metadata())
    assert (config.model_type, config.num_layers, config.vocab_size) == ("llama", 30, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tied_head and config.eos_ids == {2} and config.rope(0).theta == 100_000.0


def test_what_is_built_from_a_gguf_is_kept_and_announced_once(stub_build):
    manifest, said = read_manifest(smollm2()), []
    first = metadata_directory(manifest, said.append)
    second = metadata_directory(manifest, said.append)
    assert first == second and len(stub_build) == 1
    window = f"{smollm2().name} names no sliding window: every layer sees the whole context"
    assert said == [window, said[1]] and "seconds" in said[1]
    assert load_config(first).num_layers == 30


def test_a_gguf_with_other_metadata_has_its_own_place_in_the_cache(stub_build, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(smollm2(), copy)
    same = metadata_directory(read_manifest(copy), quiet)
    assert same == metadata_directory(read_manifest(smollm2()), quiet)
    with open(copy, "r+b") as file:
        head = file.read(4096)
        file.seek(head.index(b"Smollm2"))
        file.write(b"Xmollm2")
    assert metadata_directory(read_manifest(copy), quiet) != same


def test_a_build_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build(manifest, directory):
        directory.mkdir()
        raise ValueError("no tokenizer in it")

    monkeypatch.setattr(metadata, "_write_tokenizer", build)
    with pytest.raises(ValueError, match="no tokenizer in it"):
        metadata_directory(read_manifest(smollm2()), quiet)
    assert [path for path in tmp_path.rglob("*") if path.name != "tokenizers"] == [
        tmp_path / "layer-streamer"
    ]


def test_a_disk_that_is_full_is_named_by_the_folder_that_was_written(monkeypatch, tmp_path):
    def build(manifest, directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(metadata, "_write_tokenizer", build)
    with pytest.raises(OSError, match=f"{tmp_path}.*tokenizers: .*No space left on device"):
        metadata_directory(read_manifest(smollm2()), print)


def test_a_build_that_another_process_finished_first_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build(manifest, directory):
        directory.mkdir()
        (directory / "ours").touch()
        config = json.dumps(gguf_config(manifest), indent=2)
        target = directory.parent.parent / metadata._metadata_hash(manifest, config)
        target.mkdir()
        (target / "theirs").touch()

    monkeypatch.setattr(metadata, "_write_tokenizer", build)
    directory = metadata_directory(read_manifest(smollm2()), quiet)
    assert [path.name for path in directory.iterdir()] == ["theirs"]
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_gguf_of_a_foreign_model_is_refused_before_anything_is_built(stub_build, tmp_path):
    fields = MappingProxyType({"general.architecture": "gemma2"})
    manifest = SimpleNamespace(format="gguf", path=tmp_path, metadata=fields)
    with pytest.raises(UnsupportedModelError, match="'gemma2' is not supported"):
        metadata_directory(manifest, quiet)
    assert stub_build == []


def test_a_gguf_without_a_tokenizer_says_so_where_one_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model())
    for _ in range(2):  # made, and kept
        directory = metadata_directory(read_manifest(path), quiet)
        assert load_config(directory).vocab_size == TINY["vocab_size"]
        with pytest.raises(UnsupportedModelError, match=r"tiny.gguf: no tokenizer .*take a file"):
            load_tokenizer(directory)


def test_a_tokenizer_that_cannot_be_made_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_models, "MERGE", "a c")  # makes a token that the vocabulary lacks
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model(), tokenizer=True)
    directory = metadata_directory(read_manifest(path), quiet)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer cannot be made: .*out of voc") as e:
        load_tokenizer(directory)
    assert "\n" not in str(e.value)


def test_a_directory_without_a_tokenizer_is_told_what_to_put_there(tmp_path):
    path = tiny_checkpoint(tmp_path, tiny_model())
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer \(tokenizer.json or"):
        load_tokenizer(path)


def test_a_safetensors_directory_is_its_own_metadata_directory(tmp_path):
    path = tiny_checkpoint(tmp_path, tiny_model())
    assert metadata_directory(read_manifest(path), quiet) == path
    assert load_config(path).num_layers == TINY["num_hidden_layers"]


def test_the_ids_that_end_a_text_are_those_of_both_configs(tmp_path):
    path = tiny_checkpoint(tmp_path, tiny_model())
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_config(path).eos_ids == {2, 7, 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json"),
        ("{", "config.json: not JSON"),
        ("[]", "config.json: not a JSON object"),
        ('{"model_type": "mamba"}', "'mamba' is not supported"),
        ('{"model_type": "gemma3"}', "'gemma3' is not supported .only llama"),
        ('{"model_type": "llama", "rope_scaling": {"type": "su"}}', "rope type 'su' is not"),
        ('{"model_type": "llama", "rope_scaling": 4}', "rope_scaling=4: an object is needed"),
        (
            '{"model_type": "llama", "hidden_size": "64"}',
            "config.json: .*'hidden_size' expected int",
        ),
        (
            '{"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}',
            "config.json: rope type 'llama3' needs the field 'factor'",
        ),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def damaged(directory, damage):
    path = tiny_checkpoint(directory, tiny_model())
    byte_level().save_pretrained(path)
    damage(path / "tokenizer.json")
    return path


DAMAGES = {
    "cut off": lambda path: path.write_text(path.read_text()[:700]),
    "empty": lambda path: path.write_text(""),
    "newer": lambda path: path.write_text('{"version": "9", "model": {"type": "BPE9"}}'),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tokenizer_that_cannot_be_read_is_named_and_ids_work_without_it(tmp_path, damage):
    path = damaged(tmp_path, DAMAGES[damage])
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert ("git lfs pull" in str(caught.value)) == (damage == "pointer")
    with StreamingEngine(path, device="cpu", max_length=16) as engine:
        assert engine.generate([5, 6], max_new_tokens=2, return_details=True).ids
        for options in ({}, {"stream": True}, {"return_details": True, "stop": "x"}):
            with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: "):
                list(engine.generate([5, 6], max_new_tokens=2, **options))


def test_another_file_of_a_tokenizer_that_is_cut_off_is_named(tmp_path):
    path = damaged(tmp_path, lambda _: None)
    (path / "tokenizer_config.json").write_text('{"chat_template": "')
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(path)


def test_a_package_that_a_tokenizer_needs_is_named_and_ids_work_without_it(tmp_path, monkeypatch):
    path = tiny_checkpoint(tmp_path, tiny_model())
    (path / "tokenizer.model").write_bytes(b"\n\x00")
    monkeypatch.setattr(metadata, "FOR_SENTENCEPIECE", ("no_such_package",))
    with pytest.raises(ImportError, match=r"no_such_package.*\(pip install 'layer"):
        load_tokenizer(path)
    with StreamingEngine(path, device="cpu", max_length=16) as engine:
        assert engine.generate([5, 6], max_new_tokens=2, return_details=True).ids
        with pytest.raises(ImportError, match="no_such_package"):
            engine.generate([5, 6], max_new_tokens=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not one" * 1000, "is no tokenizer"),
        (b"version https://git-lfs.github.com/spec/v1\n", ".*git lfs pull"),
    ],
)
def test_a_sentencepiece_file_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=rf"tokenizer\.model: {message}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
