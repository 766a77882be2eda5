"""A model by its name: a path on this machine, or a repository on the Hugging Face hub.

What exists here is taken from here and no network is touched. Of a repository, only the files that
the engine reads are downloaded, by huggingface_hub: with its progress bars, into its cache, from
HF_ENDPOINT if that is set, and not at all with HF_HUB_OFFLINE=1 where the cache has them.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from layer_streamer import read_json

from .errors import optional_packages

NAMED = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?::(?P<choice>.+))?")
"""owner/name, and for GGUF a file or quantization after a colon."""

PREFIX = "hf:"
"""Before a name, it says that a repository is meant, whatever folders there are here."""

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
NOT_THE_MODEL = ("consolidated", "adapter", "mmproj", "imatrix")
"""Beginnings or parts of names of weights that are something else."""

BESIDES = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.json", "chat_template.jinja",
})  # fmt: skip
"""Files beside the weights that are read."""

SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""A part of a GGUF file in several."""


class HubError(ValueError):
    """A repository, or the file asked for, cannot be had; says why and what to do."""


def find_model(model: str | Path) -> Path:
    """Path of a model that is here, or of one that has been downloaded now or before.

    A name is taken for a path if there is something at it, if it does not have the form
    owner/name[:choice], or if its first part is a folder here: FileNotFoundError if there is
    nothing at such a path. Any other is a repository: HubError if it cannot be had.
    """
    name = str(model)
    path = Path(name).expanduser()
    if not name.startswith(PREFIX) and path.exists():
        return path
    match = NAMED.fullmatch(name.removeprefix(PREFIX))
    if isinstance(model, Path) or not match:
        raise FileNotFoundError(
            f"{name}: no such file or directory (a Hugging Face repository is named owner/name)"
        )
    folder = Path(match["repo"].partition("/")[0])
    if not name.startswith(PREFIX) and folder.is_dir():
        raise FileNotFoundError(
            f"{name}: not in the folder {str(folder)!r} (if you mean the Hugging Face repository, "
            f"write {PREFIX}{name})"
        )
    return download(match["repo"], match["choice"])


def download(repo: str, choice: str | None = None) -> Path:
    """Path of the GGUF file that was chosen, its first part if it is split, or of the directory
    with the safetensors. HubError if the repository or the choice cannot be had."""
    names, cached = _list_files(repo)
    try:
        weights = choose_gguf(repo, names, choice) if choice else choose(repo, names)
        if weights == [INDEX]:
            index = _fetch(repo, [INDEX], cached) / INDEX
            weights = [INDEX, *_shards(index, repo, names)]
    except HubError as error:
        if cached is None:
            raise
        raise HubError(f"{error} (only the cache could be asked: {cached})") from error
    gguf = weights[0].endswith(".gguf")
    besides = [] if gguf else [name for name in names if name in BESIDES]
    folder = _fetch(repo, [*weights, *besides], cached)
    return folder / weights[0] if gguf else folder


def choose(repo: str, names: Sequence[str]) -> list[str]:
    """The weights to take where none were named, as transformers does: the whole model in one file
    before an index, which stands for the files that it lists."""
    for name in (WHOLE, INDEX):
        if name in names:
            return [name]
    loose = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    loose = [name for name in loose if not name.startswith(NOT_THE_MODEL)]
    if loose:
        return loose
    files = gguf_files(names)
    if len(files) == 1:
        return files[0]
    if not files:
        raise HubError(f"{repo}: no safetensors and no GGUF files in this repository{_hint(names)}")
    raise HubError(f"{repo}: several GGUF files, name one of them: {_choices(repo, files)}")


def _hint(names: Sequence[str]) -> str:
    """What a repository without a model is."""
    if any(name.startswith("adapter_model.") for name in names):
        return (
            " but an adapter: merge it into its base model, which adapter_config.json names, and "
            "name the result"
        )
    if "model_index.json" in names:
        return " itself: a diffusers pipeline, of which no part is run here"
    return ""


def choose_gguf(repo: str, names: Sequence[str], choice: str) -> list[str]:
    """All parts of the GGUF file with this name or quantization."""
    files = gguf_files(names)
    found = [parts for parts in files if choice in parts]
    for ends in ("-./", "-./_"):  # Q2_K before Q2_K_L, but Q4_K finds a lone Q4_K_M
        label = re.compile(rf"(?:^|[{ends}]){re.escape(choice)}(?:[{ends}]|$)", re.IGNORECASE)
        found = found or [parts for parts in files if label.search(_stem(parts))]
    if len(found) == 1:
        return found[0]
    what = "several GGUF files are" if found else "no GGUF file is"
    raise HubError(
        f"{repo}: {what} named {choice!r}, there are: {_choices(repo, found or files) or 'none'}"
    )


def gguf_files(names: Sequence[str]) -> list[list[str]]:
    """The models in GGUF, each as the names of its parts in order."""
    files: dict[str, list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name.lower()
        if name.endswith(".gguf") and not any(word in base for word in NOT_THE_MODEL):
            files.setdefault(_stem([name]), []).append(name)
    return list(files.values())


def _stem(parts: Sequence[str]) -> str:
    split = SPLIT.fullmatch(parts[0])
    return split[1] if split else parts[0].removesuffix(".gguf")


def _choices(repo: str, files: Sequence[Sequence[str]]) -> str:
    return ", ".join(f"{repo}:{parts[0]}" for parts in files)


def _shards(index: Path, repo: str, names: Sequence[str]) -> list[str]:
    """The files that an index lists; HubError if it is none, or one of them is not there."""
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{repo}: {INDEX} is not an index of safetensors ({error!r})") from error
    for shard in shards:
        if shard not in names:
            raise HubError(f"{repo}: {INDEX} lists {shard!r}, which is not there")
    return shards


def _list_files(repo: str) -> tuple[list[str], Path | None]:
    """Names of the files in a repository; if only the cache can be asked, also its folder."""
    with optional_packages():
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return [file.rfilename for file in HfApi().model_info(repo).siblings or ()], None
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo}: not found at {constants.ENDPOINT}, or not open to you (hf auth login)"
        ) from error
    except Exception as error:  # its HTTP client has errors of its own, and others before it
        folder = _cached_folder(repo)
        if folder is None:
            reason = " ".join(str(error).split())
            raise HubError(
                f"{repo}: not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} "
                f"cannot be asked: {reason}"
            ) from error
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files], folder


def _cached_folder(repo: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # of no file in particular: what is missing is found out when it is asked for
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=[INDEX + "?"]))
    except LocalEntryNotFoundError:
        return None


def _fetch(repo: str, names: Sequence[str], cached: Path | None) -> Path:
    """The folder with these files, downloaded unless the cache has been asked for them."""
    from huggingface_hub import snapshot_download

    if cached is not None:
        return cached
    try:
        return Path(snapshot_download(repo, allow_patterns=[glob.escape(name) for name in names]))
    except Exception as error:  # of HTTP, of the disk, of names
        raise HubError(f"{repo}: {' '.join(str(error).split())}") from error
