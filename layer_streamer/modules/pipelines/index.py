"""A pipeline's model_index.json: of which class it is, and of which its components are.

diffusers is imported when a pipeline is asked for, and not before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoint.json_file import read_json
from ...checkpoint.locate import PIPELINE
from ...errors import ConfigError, printable

LIBRARIES = ("diffusers", "transformers")
"""Those whose models can stream: first the one whose models run once a step, then the one whose
models run once a picture."""


def is_pipeline(folder: Path, cls: Any = None) -> bool:
    """True if a folder is a pipeline's. ConfigError for a ``cls`` that is of the other kind.

    A pipeline's class is known by its bases' names: diffusers need not be there.
    """
    found = (folder / PIPELINE).is_file()
    if cls is not None:
        bases = {(base.__module__.partition(".")[0], base.__name__) for base in cls.__mro__}
        named = ("diffusers", "DiffusionPipeline") in bases
        if named and not found:
            raise ConfigError(f"{folder}: no {PIPELINE}: {cls.__name__} is a pipeline, this none")
        if found and not named:
            raise ConfigError(f"{folder}: a pipeline, and {cls.__name__} is no class of pipelines")
    return found


def pipeline_class(cls: Any, folder: Path) -> Any:
    """``cls``, or that which model_index.json names where that is None or the base of all.

    ConfigError for one that diffusers does not have.
    """
    import diffusers

    if cls is not None and cls is not diffusers.DiffusionPipeline:
        return cls
    name = read_json(folder / PIPELINE).get("_class_name")
    found = getattr(diffusers, str(name), None)
    if found is None:
        raise ConfigError(
            f"{folder}/{PIPELINE}: diffusers {diffusers.__version__} has no class "
            f"{printable(str(name))!r}: say which class, or update diffusers"
        )
    return found


def check_given(cls: Any, given: Iterable[str]) -> None:
    """ConfigError for a name that the pipeline's own class does not take."""
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"model_options: {name!r} is none of what {cls.__name__} is made of: "
                f"{', '.join(known)}"
            )


def models_of(cls: Any, folder: Path, given: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """By name, library and class of each component that is a model of transformers or diffusers,
    in the order of model_index.json, without those ``given``.

    ConfigError for a model whose library has no such class.
    """
    known = inspect.signature(cls.__init__).parameters
    found = {}
    for name, entry in read_json(folder / PIPELINE).items():
        if name in given or name not in known or not isinstance(entry, list) or len(entry) != 2:
            continue
        library, class_name = entry
        if library not in LIBRARIES or not isinstance(class_name, str):
            continue
        kind = getattr(import_module(library), class_name, None)
        if inspect.isclass(kind) and issubclass(kind, nn.Module):
            found[name] = library, kind
        elif kind is None and (folder / name / "config.json").is_file():
            version = import_module(library).__version__
            raise ConfigError(
                f"{name}: {library} {version} has no class {printable(class_name)!r}, which "
                f"{folder}/{PIPELINE} names"
            )
    return found
