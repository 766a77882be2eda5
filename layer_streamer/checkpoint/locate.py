"""What to open for a path: which files of a folder are the model, and what is no model at all.

Of a folder, what transformers would load is taken: the file that its config names, else
``model.safetensors``, else ``model.safetensors.index.json``. Then, which it would not: an index of
another name, all safetensors files together, a GGUF model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, printable
from .foreign import HEAD_BYTES, PICKLED, UNPACK, foreign_file
from .header import MAX_FILES, MAX_HEADER_BYTES, Contents, list_directory, open_header
from .json_file import read_json
from .names import file_fault, shown
from .shards import INDEX_NAME, INDEX_SUFFIX, check_parts, part_of, read_index

logger = logging.getLogger(__name__)

WHOLE_MODEL = "model.safetensors"
"""The name of a checkpoint in one file."""
ADAPTER = "adapter_model"
"""What the files of an adapter are named, suffix aside."""
ADAPTER_CONFIG = "adapter_config.json"
PIPELINE = "model_index.json"
NOT_THE_MODEL = ("adapter_", "consolidated", "mmproj", "imatrix")
"""In the names of weights that lie beside a model's own; a model may be nothing else."""
ADAPTER_PARTS = (".lora_", ".ia3_", ".hada_", ".lokr_", ".oft_", ".vera_", "prompt_embeddings")
"""In the names of tensors that an adapter consists of."""
ADAPTER_PREFIX = "base_model.model."

_OTHERS = {
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): PICKLED,
    (".onnx", ".h5", ".msgpack", ".tflite", ".npz", ".nemo", ".mlmodel", ".distcp"): (
        "weights of another kind: take a version in safetensors or GGUF"
    ),
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"): UNPACK,
    (".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp"): (
        "a download that was not finished: go on with it"
    ),
}
"""What files are, by their suffixes, in a folder without a checkpoint."""
MOST_FOLDERS = 200
"""So many of a folder's folders are looked into for a checkpoint."""


class Located(NamedTuple):
    """What is opened: ``kind`` is "gguf" (one path), "index" (one), or "files" (safetensors)."""

    kind: str
    paths: tuple[Path, ...]


def locate(path: Path) -> Located:
    """What to open for ``path``; CheckpointError, with what to do, if it is no checkpoint."""
    try:
        is_directory = path.is_dir()
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if is_directory:
        return _in_directory(path)
    if path.name.endswith(INDEX_SUFFIX):
        return Located("index", (path,))
    with open_header(path) as file:
        head = file.read(0, min(HEAD_BYTES, file.size))
    # The content decides; the name only where that is broken. A cache may keep a file under a name
    # without suffix: a length and '{' are sign enough.
    if head.startswith(b"GGUF"):
        return Located("gguf", (path,))
    plausible = int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{"
    if plausible or path.suffix == ".safetensors":
        return Located("files", (path,))
    if path.suffix == ".gguf":
        return Located("gguf", (path,))
    what = foreign_file(head, path.name, file.size) or _by_suffix([path.name])
    raise CheckpointError(
        f"{path}: neither a safetensors nor a GGUF file{f' ({what})' if what else ''}"
    )


def _in_directory(directory: Path) -> Located:
    names = list_directory(directory)
    found = [name for name in names if name.endswith((".safetensors", INDEX_SUFFIX))]
    chosen = _named_by_config(directory, names) or next(
        (name for name in (WHOLE_MODEL, INDEX_NAME) if (directory / name).is_file()), None
    )
    if chosen is None:
        if PIPELINE in names:
            raise CheckpointError(
                f"{directory}: a diffusers pipeline ({PIPELINE}), of several models: name the "
                f"folder of one of them{_below(directory)}"
            )
        found = _without_others(directory, found)
        if (ADAPTER_CONFIG in names and not found) or _all_adapters(found):
            raise CheckpointError(_adapter(directory, directory))
        indexes = [name for name in found if name.endswith(INDEX_SUFFIX)]
        if len(indexes) > 1:
            listed = ", ".join(indexes[:4])
            raise CheckpointError(f"{directory}: several index files ({listed}); name one of them")
        chosen = indexes[0] if indexes else None
    if chosen is not None:
        _say_what_is_not_read(directory, chosen, found)
        kind = "index" if chosen.endswith(INDEX_SUFFIX) else "files"
        return Located(kind, (directory / chosen,))
    if not found:
        return Located("gguf", (directory / _only_gguf(directory, names),))
    if len(found) > MAX_FILES:
        raise CheckpointError(f"{directory}: {len(found)} safetensors files, more than {MAX_FILES}")
    check_parts(directory, found)
    return Located("files", tuple(directory / name for name in found))


def _named_by_config(directory: Path, names: Sequence[str]) -> str | None:
    """The file of weights that the config names (``transformers_weights``), as few do."""
    try:
        config = read_json(directory / "config.json") if "config.json" in names else None
    except CheckpointError:
        return None  # who needs the config says what is wrong with it
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if not isinstance(name, str):
        return None
    fault = file_fault(name)
    if not fault and not name.endswith((".safetensors", INDEX_SUFFIX)):
        fault = "is neither a safetensors file nor an index of some"
    if fault:
        raise CheckpointError(
            f"{directory}: config.json: transformers_weights {shown(name)} {fault}"
        )
    return name


def _say_what_is_not_read(directory: Path, chosen: str, found: Sequence[str]) -> None:
    """A notice of shards that belong to another model than the one which is read."""
    if chosen.endswith(INDEX_SUFFIX):
        if all(part_of(name) is None for name in found):
            return
        read = set(read_index(directory / chosen).values())
    else:
        read = {chosen}
    unread = {name for name in found if part_of(name) is not None} - read
    if chosen != INDEX_NAME and INDEX_NAME in found:
        try:
            unread |= {*read_index(directory / INDEX_NAME).values()} - read
        except CheckpointError:
            unread.add(INDEX_NAME)
    if unread:
        logger.warning(
            "%s: %s is read, as transformers does, and not %s%s beside it",
            printable(str(directory)),
            printable(chosen),
            printable(min(unread)),
            f" and {len(unread) - 1} more" if len(unread) > 1 else "",
        )


def _without_others(directory: Path, names: Sequence[str]) -> list[str]:
    """The names without those of adapters and the like, unless there is nothing else."""
    kept = [name for name in names if not any(word in name.lower() for word in NOT_THE_MODEL)]
    if kept and len(kept) < len(names):
        left = ", ".join(sorted(set(names) - set(kept))[:4])
        logger.info("%s: left out: %s", printable(str(directory)), printable(left))
    return kept or list(names)


def _only_gguf(directory: Path, names: Sequence[str]) -> str:
    """The one GGUF model of a folder; the parts of one that is split count once."""
    models: dict[Any, str] = {}
    for name in _without_others(directory, [name for name in names if name.endswith(".gguf")]):
        part = part_of(name)
        models.setdefault(part.model if part else name, name)
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        listed = ", ".join(list(models.values())[:4])
        raise CheckpointError(f"{directory}: several GGUF models ({listed}); name one of them")
    what = _by_suffix(names)
    hint = f" ({what})" if what else _below(directory)
    raise CheckpointError(f"{directory}: no .safetensors or .gguf file in it{hint}")


def _by_suffix(names: Sequence[str]) -> str:
    """What the files of these names are, that are no checkpoint; '' if unknown."""
    if any(word in name for name in names for word in (".gguf.part", ".gguf-split-")):
        return "pieces of a GGUF file: join them in order first, as with cat"
    for suffixes, what in _OTHERS.items():
        if any(name.endswith(suffixes) for name in names):
            return what
    return ""


def _below(directory: Path) -> str:
    """Which folders below have a checkpoint, as a hint; '' if none is found near."""
    near: list[str] = []
    try:
        folders = [path for path in islice(directory.iterdir(), MOST_FOLDERS) if path.is_dir()]
        for folder in sorted(folders):
            deep = sorted(folder.iterdir())[:4] if folder.name == "snapshots" else [folder]
            for place in deep:
                if any(path.suffix in (".safetensors", ".gguf") for path in place.iterdir()):
                    near.append(str(place.relative_to(directory)))
    except OSError:
        pass
    return f": there are checkpoints in {', '.join(near[:4])}" if near else ""


def refuse_adapter(path: Path, contents: Contents) -> None:
    """CheckpointError if all that was read is an adapter's: weights that add to a model's."""
    names = contents.tensors
    parts = (any(mark in name for mark in ADAPTER_PARTS) for name in names)
    if names and all(
        name.startswith(ADAPTER_PREFIX) or part for name, part in zip(names, parts, strict=True)
    ):
        raise CheckpointError(_adapter(path, path if path.is_dir() else path.parent, contents))


def _all_adapters(names: Sequence[str]) -> bool:
    return bool(names) and all(name.startswith(ADAPTER) for name in names)


def _adapter(path: Path, directory: Path, contents: Contents | None = None) -> str:
    """What is said of an adapter."""
    base: object = contents.metadata.get("general.base_model.0.name") if contents else None
    kind: object = "LoRA"
    try:
        config = read_json(directory / ADAPTER_CONFIG)
        base = config.get("base_model_name_or_path") or base
        kind = config.get("peft_type") or kind
    except (CheckpointError, AttributeError):
        pass  # the adapter without its config
    kind = "LoRA" if kind == "LORA" else kind if isinstance(kind, str) else "LoRA"
    base = shown(base) if isinstance(base, str) else "its base model"
    return (
        f"{path}: an adapter ({kind[:40]}) of {base}, no model by itself: merge it into that one "
        "(peft: merge_and_unload, then save_pretrained), and name what was saved"
    )
