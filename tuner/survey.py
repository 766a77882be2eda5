"""What a tune has to know of machine and engine, asked of a child: this process opens no device.

Even to ask torch for a GPU's name initialises CUDA. So a fresh process opens the devices, looks at
the machine and the limits on record, and says what it found; another one asks an engine how it
would share out memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..machine.limits import MachineLimits, decode
from ..planning.placement import Rates
from ..planning.plan import Machine
from .trials.model_args import decode_model
from .trials.record import Settings, TrialSpec

SECONDS = 300
"""A GPU that has been asleep takes a while to open."""
START = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from layer_streamer.tuner.surveyor import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Survey:
    """A machine as a fresh process sees it, with nothing of ours on its devices."""

    machine: Machine
    identity: dict[str, Any]
    """What tells this machine from another: machine.MachineIdentity as JSON has it."""
    limits: MachineLimits | None
    """What a probe has put on record."""
    baseline_bytes: int
    """Host memory of a process that has done nothing but open the devices."""


def take_survey(device: str | list[str] | None, path: Path) -> Survey:
    """Look at the machine. ``path``: a file of the checkpoint, for its file system's limits.

    ConfigError if a device cannot be opened, with its line.
    """
    return parse(_ask({"device": device, "path": str(path)}, f"device={device!r}: "))


def ask_engine(spec: TrialSpec, candidates: Sequence[Settings]) -> list[Mapping[str, Any] | str]:
    """By candidate, the streamer's options in an engine with these settings, or why there is none.

    ConfigError if the engine cannot be had at all, with its line.
    """
    question = {
        "engine": spec.engine,
        "model": dict(spec.model),
        "candidates": [dict(settings) for settings in candidates],
    }
    answers = _ask(question, "")
    return [answer if isinstance(answer, str) else decode_model(answer) for answer in answers]


def _ask(question: Mapping[str, Any], about: str) -> Any:
    """The answer of a fresh process. ConfigError, which begins with ``about``, if it has none."""
    # Imports as this process does, not from the folder that it happens to be in.
    paths = [entry for entry in sys.path if isinstance(entry, str)]
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", START, json.dumps(paths)],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{about}no answer within {SECONDS} s") from error
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        said = process.stderr.strip().splitlines() or [f"it ended with {process.returncode}"]
        raise ConfigError(f"{about}{said[-1]}")
    return json.loads(lines[-1])


def parse(document: dict[str, Any]) -> Survey:
    """What the surveyor wrote."""
    found = dict(document["machine"])
    rates = Rates(None, (None,) * len(found["devices"]))
    machine = Machine(
        devices=tuple(found["devices"]),
        unified=found["unified"],
        maps_files=found["maps_files"],
        device_free=tuple(found["device_free"]),
        host_available=found["host_available"],
        rates=rates,
        readers={mode: (pair[0], pair[1]) for mode, pair in found["readers"].items()},
    )
    limits = document["limits"]
    return Survey(
        machine,
        document["identity"],
        decode(limits, MachineLimits) if limits is not None else None,
        document["baseline_bytes"],
    )
