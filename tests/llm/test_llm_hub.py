"""Models by name: paths that never touch the network, and a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_models import write_gguf
from hub_server import COMMIT, REPO, serve
from interpreters import run_script
from paths import ROOT
from zoo import zoo_model

from layer_streamer.llm.hub import BESIDES, INDEX, HubError, choose, choose_gguf, find_model

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SPLIT = [f"big/tiny-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A folder to be in, and no huggingface_hub to import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path


@pytest.mark.parametrize("name", ["a.gguf", "owner/name", "./folder", "owner/name:Q4_K_M"])
@pytest.mark.parametrize("kind", [str, Path])
def test_what_exists_here_is_taken_from_here(no_hub, name, kind):
    (no_hub / name).mkdir(parents=True)
    assert find_model(kind(name)) == Path(name)


def test_a_path_may_begin_at_home(no_hub, monkeypatch):
    monkeypatch.setenv("HOME", str(no_hub))
    (no_hub / "a.gguf").touch()
    assert find_model("~/a.gguf") == no_hub / "a.gguf"


@pytest.mark.parametrize(
    "name",
    ["/no/model", "./no", "../a/b", "~/no", "a.gguf", "a/b/c", "a\\b", "gpt2", "a/b:", "a b/c"],
)
def test_a_path_with_nothing_at_it_is_an_error_without_network(no_hub, name):
    with pytest.raises(FileNotFoundError, match=r"no such file .* is named owner/name"):
        find_model(name)


def test_a_path_object_is_never_a_repository(no_hub):
    with pytest.raises(FileNotFoundError):
        find_model(Path("owner/name"))


def test_a_name_below_a_folder_that_is_here_is_a_path_unless_it_says_otherwise(no_hub):
    (no_hub / "models").mkdir()
    with pytest.raises(FileNotFoundError, match=r"not in the folder 'models' .* write hf:models/a"):
        find_model("models/a")
    with pytest.raises(ImportError):  # so it would have asked the hub
        find_model("hf:models/a")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "a.gguf"], ["model.safetensors"]),
        ([INDEX, *SHARDS, "consolidated.safetensors"], [INDEX]),
        ([INDEX, *SHARDS, "model.safetensors"], ["model.safetensors"]),
        (["b.safetensors", "consolidated.safetensors", "other/c.safetensors"], ["b.safetensors"]),
        (["a-Q4_0.gguf", "mmproj-a-f16.gguf", "README.md"], ["a-Q4_0.gguf"]),
        ([*reversed(SPLIT), "config.json"], SPLIT),
    ],
)  # fmt: skip
def test_where_nothing_is_named_the_one_model_of_a_repository_is_taken(names, chosen):
    assert choose("a/b", names) == chosen


def test_several_files_are_listed_as_what_to_write():
    message = "a/b: several GGUF files, name one of them: a/b:x-Q4_0.gguf, a/b:x-Q8_0.gguf"
    with pytest.raises(HubError) as caught:
        choose("a/b", ["x-Q8_0.gguf", "x-Q4_0.gguf"])
    assert str(caught.value) == message


def test_a_repository_without_weights_that_can_be_read_is_an_error():
    with pytest.raises(HubError, match="a/b: no safetensors and no GGUF"):
        choose("a/b", ["pytorch_model.bin", "config.json"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_model.safetensors", "adapter_config.json"], "but an adapter: merge it into"),
        (["adapter_model.bin", "adapter_config.json"], "but an adapter: merge it into"),
        (["model_index.json", "unet/model.safetensors"], "itself: a diffusers pipeline"),
    ],
)
def test_a_repository_of_something_else_is_named_for_what_it_is(names, message):
    with pytest.raises(HubError, match=message):
        choose("a/b", names)


GGUFS = [
    "x-Q2_K.gguf",
    "x-Q2_K_L.gguf",
    "x-Q4_K_M.gguf",
    "x-Q4_K_S.gguf",
    "x.IQ4_XS.gguf",
    "x-bf16.gguf",
    *SPLIT,
]


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ("x-Q4_K_M.gguf", ["x-Q4_K_M.gguf"]),
        ("Q4_K_M", ["x-Q4_K_M.gguf"]),
        ("Q2_K", ["x-Q2_K.gguf"]),
        ("IQ4", ["x.IQ4_XS.gguf"]),
        ("q4_k_s", ["x-Q4_K_S.gguf"]),
        ("IQ4_XS", ["x.IQ4_XS.gguf"]),
        ("BF16", ["x-bf16.gguf"]),
        ("Q8_0", SPLIT),
        (SPLIT[1], SPLIT),
    ],
)
def test_a_gguf_file_is_found_by_name_or_quantization_with_all_its_parts(choice, chosen):
    assert choose_gguf("a/b", GGUFS, choice) == chosen


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("Q4", "several GGUF files are named 'Q4', there are: a/b:x-Q4_K_M.gguf, a/b:x-Q4_K_S.gg"),
        ("Q6_K", "no GGUF file is named 'Q6_K'"),
        ("x", "several GGUF files are named 'x', there are: a/b:x-Q2_K.gguf, a/b:x-"),
    ],
)
def test_a_choice_that_fits_no_file_or_several_is_answered_with_those_there_are(choice, message):
    with pytest.raises(HubError, match=message):
        choose_gguf("a/b", GGUFS, choice)


FIND = """
import json, sys
from layer_streamer.llm.hub import HubError, find_model
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(find_model(name))))
    except HubError as error:
        print(json.dumps(f"error: {error}"))
"""


def find(home: Path, endpoint: str, *names: str, **environment: str) -> list[str]:
    """What another process, with a cache of its own, finds under these names."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    result = run_script(FIND, *names, environment=settings | environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


BESIDE = dict.fromkeys(sorted(BESIDES), b"{}")
NOT_NEEDED = {
    "pytorch_model.bin": b"bin",
    "original/consolidated.00.pth": b"pth",
    "consolidated.safetensors": b"again",
    "README.md": b"readme",
    "onnx/model.safetensors": b"onnx",
}


def test_only_the_files_that_are_read_are_downloaded_and_then_they_are_in_the_cache(tmp_path):
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode()
    needed = BESIDE | {INDEX: index, SHARDS[0]: b"one", SHARDS[1]: b"two"}
    with serve(needed | NOT_NEEDED | {"other.safetensors": b"x"}) as (endpoint, asked):
        (first,) = find(tmp_path, endpoint, REPO)
        assert contents(Path(first)) == needed
        asked.clear()
        assert find(tmp_path, endpoint, REPO, HF_HUB_OFFLINE="1") == [first]
        assert asked == []
    assert find(tmp_path, endpoint, REPO) == [first]  # the hub is gone by now


def test_a_split_gguf_file_is_downloaded_whole_and_its_first_part_is_the_model(tmp_path):
    files = {SPLIT[0]: b"one", SPLIT[1]: b"two", "tiny-Q4_0.gguf": b"other", "config.json": b"{}"}
    with serve(files) as (endpoint, _):
        found, ambiguous, foreign = find(tmp_path, endpoint, f"{REPO}:q8_0", REPO, "nobody/nothing")
    assert found.endswith(SPLIT[0])
    folder = Path(found).parent.parent
    assert contents(folder) == {SPLIT[0]: b"one", SPLIT[1]: b"two"}
    assert ambiguous.startswith("error: someone/tiny: several GGUF files, name one")
    assert foreign.startswith(f"error: nobody/nothing: not found at {endpoint}, or not open")


def cache_entry(home: Path, files: dict[str, bytes]) -> Path:
    """A repository in the cache, as huggingface_hub lays it out."""
    repository = home / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    return snapshot


def test_offline_the_cache_is_all_there_is(tmp_path):
    snapshot = cache_entry(tmp_path, {"tiny-Q4_0.gguf": b"x"})
    found, missing, absent = find(
        tmp_path, "http://127.0.0.1:9", REPO, f"{REPO}:Q8_0", "a/b", HF_HUB_OFFLINE="1"
    )
    assert found == str(snapshot / "tiny-Q4_0.gguf")
    assert "no GGUF file is named 'Q8_0'" in missing and "only the cache could be asked" in missing
    assert absent.startswith("error: a/b: not in the cache ") and "\n" not in absent


def test_an_index_that_lists_what_is_not_there_is_an_error(tmp_path):
    index = json.dumps({"weight_map": {"a": "../../secret"}}).encode()
    cache_entry(tmp_path, {INDEX: index})
    (found,) = find(tmp_path, "http://127.0.0.1:9", REPO, HF_HUB_OFFLINE="1")
    assert "lists '../../secret', which is not there" in found


LOAD = """
import sys
from pathlib import Path
from layer_streamer.llm.hub import find_model
from layer_streamer.llm.metadata import load_config, load_tokenizer, metadata_directory
from layer_streamer import read_manifest
directory = metadata_directory(read_manifest(find_model(sys.argv[1])), print)
load_config(directory)
load_tokenizer(directory)
"""


@pytest.mark.slow
def test_a_model_that_is_here_is_described_without_any_network(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, zoo_model("llama"), tokenizer=True)
    with serve({}) as (endpoint, asked):
        settings = {"HF_ENDPOINT": endpoint, "PYTHONPATH": "."}
        settings |= {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", LOAD, str(path)]
        subprocess.run(command, env=os.environ | settings, cwd=ROOT, check=True)
        assert asked == []
