"""A model's config and tokenizer files, wherever its checkpoint keeps them.

A safetensors directory has them beside the weights. A GGUF file carries them in its metadata;
building them from there takes transformers seconds, so the result is kept in the user's cache
directory under the hash of the metadata.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from layer_streamer import CheckpointError, Manifest, cache_path, read_json

from .errors import UnsupportedModelError, optional_packages
from .generation_config import read_generation_config
from .models.config import ModelConfig, check_model_type, model_config
from .models.config_fields import config_fields, text_part
from .models.gguf_config import gguf_config, window_note
from .models.rope_config import check_rope_types
from .text.direct_tokenizer import DESCRIPTION, describe, direct_tokenizer
from .text.gguf_tokenizer import gguf_tokenizer, pre_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of them is a tokenizer."""
FOR_SENTENCEPIECE = ("sentencepiece", "google.protobuf")
"""Packages that a tokenizer.model without tokenizer.json needs."""
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
POINTER_NBYTES = 1024
"""Git LFS's pointers to files are smaller, and tokenizers are not."""
NO_TOKENIZER = "no_tokenizer.txt"
"""In a directory made of a GGUF file: why its tokenizer could not be made."""
CACHE_VERSION = 3
"""Of what is kept of a GGUF file."""


def metadata_directory(manifest: Manifest, notify: Callable[[str], None]) -> Path:
    """The directory with the model's config and tokenizer, made on the first use of a GGUF file.

    On that first use, ``notify`` hears of work that takes seconds, before it starts, and of what
    the file leaves out; later, the latter is only logged.
    """
    if manifest.format != "gguf":
        return manifest.path if manifest.path.is_dir() else manifest.path.parent
    config = json.dumps(gguf_config(manifest), indent=2)
    note = window_note(manifest)
    _tell_of_words(manifest, notify)
    name = _metadata_hash(manifest, config)
    directory = cache_path("tokenizers", name)
    if directory.is_dir():
        if note is not None:
            logger.info(note)
    else:
        if note is not None:
            notify(note)
        notify("building the tokenizer from the GGUF file: about 6 seconds, this once ...")
        directory = cache_path("tokenizers", make=True) / name
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            made = Path(temporary) / "made"
            try:
                _describe(manifest, config, made)
            except OSError as error:  # a full disk, which has no name where a file is written
                raise OSError(
                    f"{directory.parent}: the tokenizer cannot be kept there: {error}"
                ) from error
            try:
                made.replace(directory)
            except OSError:  # another process was first; what it made is the same
                if not directory.is_dir():
                    raise
    return directory


def _describe(manifest: Manifest, config: str, made: Path) -> None:
    """Write what a model's directory has beside its weights; ids alone are continued without a
    tokenizer that can be made."""
    try:
        _write_tokenizer(manifest, made)
    except UnsupportedModelError as error:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        (made / NO_TOKENIZER).write_text(str(error), encoding="utf-8")
    (made / "config.json").write_text(config, encoding="utf-8")


def _tell_of_words(manifest: Manifest, notify: Callable[[str], None]) -> None:
    """Each time: what a file says of its words changes every text."""
    try:
        _, note = pre_tokenizer(manifest.metadata)
    except ValueError:  # of which the tokenizer's own error tells
        return
    if note is not None:
        notify(f"{_first_file(manifest).name}: {note}")


def refuse_by_config(path: Path) -> None:
    """UnsupportedModelError if the config beside a checkpoint is of a model that the engine does
    not compute: the better reason why such a checkpoint cannot be read."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        try:
            fields = text_part(_read_json(config))
            check_model_type(str(fields.get("model_type")), fields)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{config}: {error}") from error


def load_config(directory: Path) -> ModelConfig:
    """The engine's config of a model; its eos_ids are those of both configs of the directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{directory}: no config.json")
    fields = text_part(_read_json(path))
    try:
        check_model_type(str(fields.get("model_type")), fields)
        check_rope_types(fields)
        config = model_config(config_fields(fields))
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{path}: {' '.join(str(error).split())}") from error
    return replace(config, eos_ids=config.eos_ids | read_generation_config(directory).eos_ids)


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, with the interface of transformers' tokenizers, and through
    transformers unless that makes no difference.

    UnsupportedModelError, in one line, if there is none or it cannot be read; ImportError if a
    package is missing that reads it.
    """
    reason = directory / NO_TOKENIZER
    if reason.is_file():
        raise UnsupportedModelError(reason.read_text(encoding="utf-8"))
    found = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not found:
        raise UnsupportedModelError(
            f"{directory}: no tokenizer ({' or '.join(TOKENIZER_FILES)}); "
            "copy its files there from where the model comes from"
        )

    def load() -> Any:
        with optional_packages():
            from transformers import AutoTokenizer

            if found[0] == "tokenizer.model":
                for package in FOR_SENTENCEPIECE:  # else transformers takes it for another format
                    import_module(package)
            with without_marks(directory) as folder:
                return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)

    try:
        direct = direct_tokenizer(directory, load)
        return load() if direct is None else direct
    except ImportError:
        raise
    except Exception as error:  # tokenizers and transformers raise nothing narrower
        raise UnsupportedModelError(_blame(directory, found[0], error)) from error


def _blame(directory: Path, name: str, error: Exception) -> str:
    """Which of the files it is that cannot be read as a tokenizer's."""
    for path in (directory / name, *sorted(directory.glob("*token*.json"))):
        try:
            with open(path, "rb") as file:
                is_small = len(file.read(POINTER_NBYTES)) < POINTER_NBYTES
            if is_small or path.suffix == ".json":
                read_json(path)
        except CheckpointError as damage:
            return f"{damage}; fetch it again"
        except OSError as damage:
            return f"{path}: cannot be read ({' '.join(str(damage).split())}); fetch it again"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"{directory / name}: is no tokenizer that the installed transformers "
        f"{_version_of('transformers')} and tokenizers {_version_of('tokenizers')} understand "
        f"({reason}); fetch it again, or install newer ones"
    )


@contextmanager
def without_marks(directory: Path) -> Iterator[Path]:
    """The directory; where an editor has put a byte order mark before one of its JSON files, which
    transformers takes for a fault, a temporary one of links to its files and copies without it."""
    marked: dict[Path, bytes] = {}
    for path in directory.glob("*.json"):
        raw = path.read_bytes()
        if raw.startswith(MARKS):
            marked[path] = raw.decode(json.detect_encoding(raw)).encode()
    if not marked:
        yield directory
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in directory.iterdir():
            copy = Path(temporary) / path.name
            if path in marked:
                copy.write_bytes(marked[path])
            else:
                copy.symlink_to(path.absolute())
        yield Path(temporary)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise UnsupportedModelError(str(error)) from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path}: not a JSON object")
    return content


def _first_file(manifest: Manifest) -> Path:
    """The file that holds the metadata: of a split GGUF, the first part."""
    return min(manifest.files)


def _metadata_hash(manifest: Manifest, config: str) -> str:
    """Hash of all bytes before the first tensor's, and of what is derived from them."""
    path = _first_file(manifest)
    specs = [*manifest.static.values()]
    for layer in manifest.layers:
        specs.extend(layer.tensors.values())
    size = manifest.files[path].size
    with open(path, "rb") as file:
        header = file.read(min((spec.offset for spec in specs if spec.path == path), default=size))
    makers = f"{_version_of('transformers')} {CACHE_VERSION}"
    return hashlib.sha256(header + makers.encode() + config.encode()).hexdigest()


def _version_of(package: str) -> str:
    """Without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _write_tokenizer(manifest: Manifest, directory: Path) -> None:
    path, fields = _first_file(manifest), manifest.metadata
    if fields.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        raise UnsupportedModelError(
            f"{path}: no tokenizer (metadata tokenizer.ggml.model); take a file that has one"
        )
    with optional_packages():
        from transformers import AutoTokenizer

        def by_transformers() -> Any:
            return AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False
            )

        try:
            tokenizer = gguf_tokenizer(fields, by_transformers)
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            reason = " ".join(str(error).split())
            raise UnsupportedModelError(
                f"{path}: its tokenizer cannot be made: {reason}"
            ) from error
        try:
            tokenizer.save_pretrained(str(directory))
        except Exception as error:  # so does tokenizers for a disk that is full
            raise OSError(" ".join(str(error).split())) from error
        saved = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    description = describe(saved, directory)
    if description is not None:
        (directory / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
