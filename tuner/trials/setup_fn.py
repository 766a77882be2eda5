"""The user's functions by their names: named in the parent, imported in a trial's child."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from ...errors import ConfigError
from .record import FunctionName

TRIAL_VARIABLE = "LAYER_STREAMER_TRIAL"
"""Environment variable of every process of a trial."""
SCRIPT = "__mp_main__"
"""What a script is called in a child: by convention, a __main__ that is run again for its names."""

_kept: list[ModuleType] = []
"""Modules that another took the name of, so that their globals stay."""


class EndOfImport(BaseException):
    """A script that is imported in a trial's child has come to tune()."""


def end_import_in_child() -> None:
    """What ``tune()`` calls first. In a child it ends the script's import where it stands."""
    if TRIAL_VARIABLE in os.environ:
        raise EndOfImport("tune() was called in a trial: a trial does not tune")


def name_function(function: Callable[..., Any], option: str = "setup_fn") -> FunctionName:
    """The name by which a fresh process can import ``function``, which was given as ``option``.

    ConfigError for a lambda, a function inside another, a method of an instance, whatever else its
    module does not have under its name, and for a __main__ that is no file (a prompt, -c, stdin).
    """
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not callable(function) or not isinstance(module, str) or not isinstance(qualname, str):
        raise ConfigError(f"{option}={function!r}: must be a function that its module has by name")
    if (reason := _why_not(function, module, qualname)) is not None:
        raise ConfigError(
            f"{option}={qualname}: {reason}, so a fresh process cannot import it; "
            "define it with def at the top of a module"
        )
    found = sys.modules[module]
    file = getattr(found, "__file__", None)
    if not isinstance(file, str) or not Path(file).is_file():
        where = "a prompt, -c or stdin" if module == "__main__" else f"module {module!r}"
        raise ConfigError(
            f"{option}={qualname}: {where} is no file that a fresh process could import it from; "
            "put it in a file"
        )
    spec = getattr(found, "__spec__", None)
    if module == "__main__" and isinstance(spec, ModuleSpec) and spec.name != "__main__":
        module = spec.name  # python -m
    path = str(Path(file).absolute())
    return FunctionName(module=module, qualname=qualname, file=path, option=option)


def load_function(name: FunctionName) -> Callable[..., Any]:
    """Import the function that ``name`` leads to. What its module raises, or ConfigError."""
    found: object = _load_module(name)
    try:
        function = functools.reduce(getattr, name.qualname.split("."), found)
    except AttributeError as error:
        raise ConfigError(
            f"{name.option}={name.qualname}: {name.file}, imported by a trial, has not defined it; "
            "define it at the top, above tune() and outside of any __main__ guard"
        ) from error
    if not callable(function):
        raise ConfigError(f"{name.option}={name.qualname}: {name.file} defines it as {function!r}")
    return function


def _why_not(function: object, module: str, qualname: str) -> str | None:
    """Why a fresh process cannot import it; None if it can."""
    for part, kind in (("<lambda>", "a lambda"), ("<locals>", "defined inside a function")):
        if part in qualname.split("."):
            return f"is {kind}"
    found: object = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    of_class = isinstance(found, MethodType) and found == function
    if found is function or of_class:
        return None
    if found is None:
        return f"module {module!r} has nothing of that name"
    if isinstance(function, MethodType):
        return "is a method of an instance"
    return f"{module}.{qualname} is something else by now (decorated, or defined again)"


def _load_module(name: FunctionName) -> ModuleType:
    is_script = name.module == "__main__"
    loaded = sys.modules.get(SCRIPT if is_script else name.module)
    # A script is run once, however many of its functions are asked for: they share its globals.
    if loaded is not None and (not is_script or loaded.__file__ == name.file):
        return loaded
    if is_script:  # whatever its name ends with
        loader = SourceFileLoader(SCRIPT, name.file)
        spec = spec_from_file_location(SCRIPT, name.file, loader=loader)
    else:
        spec = find_spec(name.module)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name.option}={name.qualname}: no module {name.module!r} is found")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    if is_script:
        _kept.append(sys.modules["__main__"])
        sys.modules["__main__"] = module
    # What a script has defined when it comes to tune() is all that a trial may need.
    with suppress(EndOfImport):
        spec.loader.exec_module(module)
    return module
