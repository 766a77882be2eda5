"""A transformers model without its weights: its own class, as its own loader makes it, on meta.

transformers is imported when a model is asked for, and not before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.json_file import read_json
from ..checkpoint.locate import PIPELINE
from ..checkpoint.manifest import TensorSpec
from ..errors import CheckpointError, ConfigError, printable
from ..planning.layout import CASTABLE

REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
"""owner/name."""
PACKAGES = ("transformers", "diffusers", "accelerate", "huggingface_hub")
"""Those of the extra [hf]."""
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
"""Files of a repository that are downloaded."""
VARIANTS = ["*.*.safetensors", "*.*.safetensors.index.json", "*.safetensors.index.*.json"]
"""Those of a pipeline that are not: the same weights in another precision."""


@contextmanager
def naming_extra() -> Iterator[None]:
    """Has an ImportError of a package that only streamed models need say how it is installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise ImportError(
            f"{error.name} is not installed (pip install 'layer-streamer[hf]')", name=error.name
        ) from error


def local_folder(model: str | Path) -> Path:
    """Where a model's files are: a path, or a repository of the hub, downloaded if it is not here.

    Errors: CheckpointError for what is neither.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, Path) or not REPOSITORY.fullmatch(model):
        raise CheckpointError(
            f"{printable(str(model))}: no such file or directory (a repository is named owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        index = Path(snapshot_download(model, allow_patterns=[PIPELINE])) / PIPELINE
        if not index.is_file():
            return Path(snapshot_download(model, allow_patterns=WANTED))
        # Beside its components a pipeline may have the same in one file, and variants of each.
        parts = [name for name, entry in read_json(index).items() if isinstance(entry, list)]
        wanted = [f"{part}/{pattern}" for part in parts for pattern in WANTED]
        wanted += [pattern for pattern in WANTED if pattern != "*.safetensors"]
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=VARIANTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model}: cannot be had from the hub: {reason}") from error


def class_of(folder: Path) -> Any:
    """The transformers class that config.json names, or its type's for text if it names none.

    ConfigError if there is none such.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    named = config.get("architectures") or []
    if not named and config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ConfigError(f"{folder}/config.json: names no architecture: say which class by cls=")
    found = getattr(transformers, named[0], None)
    if found is None and not config.get("auto_map"):
        raise ConfigError(
            f"{folder}/config.json: transformers {transformers.__version__} has no class "
            f"{printable(named[0])!r}: say which class by cls=, or update transformers"
        )
    return found if found is not None else transformers.AutoModelForCausalLM


def build(
    cls: Any,
    folder: Path,
    specs: Mapping[str, TensorSpec],
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> nn.Module:
    """The model of ``folder`` with all parameters on meta, for inference; nothing is read.

    ``specs``: the checkpoint's tensors by name. ``dtype``: None is the configuration's, or that of
    the checkpoint's first floating-point tensor. ``options``: of ``from_config`` and, as
    ``config``, a configuration in place of the folder's. ConfigError for options that a streamed
    model cannot have.
    """
    import transformers

    for name in ("device_map", "tp_plan", "quantization_config", "max_memory"):
        if options.get(name) is not None:
            raise ConfigError(f"{name}=: not beside streaming, which places the weights itself")
    options = dict(options)
    config = options.pop("config", None)
    trusted = {"trust_remote_code": options.pop("trust_remote_code", False)}
    if config is None:
        config = transformers.AutoConfig.from_pretrained(folder, **trusted)
    floats = (spec.dtype for spec in specs.values() if spec.dtype in CASTABLE)
    dtype = dtype or config.dtype or next(floats, torch.float32)
    auto = not hasattr(cls, "_from_config")
    make = partial(cls.from_config, **trusted) if auto else cls._from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype, **options)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    found: nn.Module = model.eval().requires_grad_(False)
    return found


def make_buffers(model: Any, made: Iterable[str], device: torch.device) -> None:
    """Compute on ``device`` what no checkpoint has: buffers (rotations and the like), and ``made``,
    parameters that the model's class says it makes itself.

    By the model's own rules, as its loader does it: parameters and persistent buffers are marked as
    there, so that nothing else is touched.
    """
    apart = set[int]()
    for name, _ in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffers[leaf] = torch.empty_like(buffers[leaf], device=device)
        apart.add(id(buffers[leaf]))
    for name in made:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)._parameters
        real = torch.empty_like(holder[leaf], device=device)
        holder[leaf] = nn.Parameter(real, requires_grad=False)
        apart.add(id(holder[leaf]))
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in apart:
            tensor._is_hf_initialized = True
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    with torch.no_grad():
        model.initialize_weights()


def is_hub_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def runs_once(model: Any, part: nn.Module) -> bool:
    """True if a generation comes to ``part`` of the model once, and to others for each token: an
    encoder-decoder's encoder."""
    find = getattr(model, "get_decoder", None)
    if find is None or not getattr(model.config, "is_encoder_decoder", False):
        return False
    return all(module is not part for module in find().modules())
