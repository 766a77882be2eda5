"""The child of a survey, which :mod:`.survey` starts.

JSON in: {"device", "path"}, to look at the machine; {"engine", "model", "candidates"}, to ask an
engine for its plans; {"streamed", "setup_fn"}, to look at a streamed model. The last line of stdout
is the answer, as JSON.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from ..assembly import look_at_machine, rates_on_record
from ..devices.accelerator import open_devices
from ..errors import StreamerError
from ..machine.identity import this_machine
from ..machine.limits import load_limits
from .survey import Survey
from .trials.model_args import decode_model, encode_model
from .trials.record import FunctionName
from .trials.setup_fn import TRIAL_VARIABLE, load_function


def look(device: Any, path: Path) -> Survey:
    """Open the devices and describe the machine."""
    devices = open_devices(device)
    limits = load_limits(path)
    memory = psutil.Process().memory_info()
    return Survey(
        look_at_machine(devices, rates_on_record(limits, devices), limits),
        this_machine(),
        limits,
        # Libraries' files are page cache that any process may share.
        max(memory.rss - getattr(memory, "shared", 0), 0),
    )


def plan(asked: Mapping[str, Any]) -> list[Any]:
    """By candidate, the streamer's options in the engine, or a line that refuses it."""
    plan_engines = import_module(asked["engine"]).plan_engines
    answers = plan_engines(candidates=asked["candidates"], **decode_model(asked["model"]))
    return [answer if isinstance(answer, str) else encode_model(answer) for answer in answers]


def look_at_streamed(asked: Mapping[str, Any]) -> str:
    """A :class:`Streamed`, pickled, in base64. A script that is imported for its setup_fn does not
    tune here."""
    os.environ[TRIAL_VARIABLE] = "survey"
    from ..modules.tuning import describe

    options = decode_model(asked["streamed"])
    if asked["setup_fn"] is not None:
        options["setup_fn"] = load_function(FunctionName(**asked["setup_fn"]))
    return base64.b64encode(pickle.dumps(describe(**options))).decode()


def main(asked: Mapping[str, Any]) -> None:
    """Exit code 2 with one line on stderr if a device cannot be opened, or an engine not be had."""
    found: Any
    try:
        if "engine" in asked:
            found = plan(asked)
        elif "streamed" in asked:
            found = look_at_streamed(asked)
        else:
            found = asdict(look(asked["device"], Path(asked["path"])))
    except (StreamerError, ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found), flush=True)
