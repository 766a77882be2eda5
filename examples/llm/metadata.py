"""A model's config and tokenizer files, wherever its checkpoint keeps them.

A safetensors directory has them beside the weights. A GGUF file carries them in its metadata;
building them from there takes transformers seconds, so the result is kept in the user's cache
directory under the hash of the metadata.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layer_streamer import Manifest

from .cache import cache_root
from .config import ModelConfig, UnsupportedModelError, check_model_type, id_set, model_config


def metadata_directory(manifest: Manifest, notify: Callable[[str], None]) -> Path:
    """The directory with the model's config and tokenizer, made on the first use of a GGUF file.

    ``notify`` hears, before it starts, of work that takes seconds.
    """
    if manifest.format != "gguf":
        return manifest.path if manifest.path.is_dir() else manifest.path.parent
    _check_gguf(manifest)
    directory = cache_root() / "tokenizers" / _metadata_hash(manifest)
    if not directory.is_dir():
        notify("building the tokenizer from the GGUF file: about 6 seconds, this once ...")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            made = Path(temporary) / "made"
            _write_metadata(manifest, made)
            try:
                made.replace(directory)
            except OSError:  # another process was first; what it made is the same
                if not directory.is_dir():
                    raise
    return directory


def load_config(directory: Path) -> ModelConfig:
    """The engine's config of a model; its eos_ids are those of both configs of the directory."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{directory}: no config.json")
    # Before AutoConfig, whose refusal of a foreign model is a page long.
    check_model_type(str(_read_json(path).get("model_type")))
    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos = id_set(getattr(config, "eos_token_id", None))
        config.eos_token_id = sorted(eos | id_set(_read_json(generation).get("eos_token_id")))
    return model_config(config)


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, through transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path}: not a JSON object")
    return content


def _check_gguf(manifest: Manifest) -> None:
    architecture = str(manifest.metadata.get("general.architecture"))
    check_model_type(architecture)
    scaling = str(manifest.metadata.get(f"{architecture}.rope.scaling.type", "none"))
    if scaling != "none":
        raise UnsupportedModelError(f"{manifest.path}: rope scaling {scaling!r} is not supported")


def _first_file(manifest: Manifest) -> Path:
    """The file that holds the metadata: of a split GGUF, the first part."""
    return min(manifest.files)


def _metadata_hash(manifest: Manifest) -> str:
    """Hash of all bytes before the first tensor's, and of the version that derives from them."""
    from transformers import __version__

    path = _first_file(manifest)
    specs = [*manifest.static.values()]
    for layer in manifest.layers:
        specs.extend(layer.tensors.values())
    size = manifest.files[path].size
    with open(path, "rb") as file:
        header = file.read(min((spec.offset for spec in specs if spec.path == path), default=size))
    return hashlib.sha256(header + __version__.encode()).hexdigest()


def _write_metadata(manifest: Manifest, directory: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    path = _first_file(manifest)
    source = {"gguf_file": path.name, "trust_remote_code": False}
    AutoTokenizer.from_pretrained(str(path.parent), **source).save_pretrained(str(directory))
    config = AutoConfig.from_pretrained(str(path.parent), **source)
    metadata = manifest.metadata
    # transformers drops these two: a head's width, and the id that ends a turn of a chat.
    width = metadata.get(f"{metadata['general.architecture']}.attention.key_length")
    if width is not None:
        config.head_dim = int(width)
    eos = id_set(getattr(config, "eos_token_id", None))
    config.eos_token_id = sorted(eos | id_set(metadata.get("tokenizer.ggml.eot_token_id")))
    config.save_pretrained(str(directory))
