"""What a tune has to know of machine and engine, asked of a child: this process opens no device.

Even to ask torch for a GPU's name initialises CUDA. So a fresh process opens the devices, looks at
the machine and the limits on record, and says what it found; another one asks an engine how it
would share out memory.
"""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..machine.identity import MachineIdentity
from ..machine.limits import MachineLimits
from ..machine.records import Form
from ..modules.tuning import Streamed
from ..planning.plan import Machine
from .trials.model_args import decode_model
from .trials.process import CHILD, child_request
from .trials.record import Choice, TrialSpec

SECONDS = 300
"""A GPU that has been asleep takes a while to open."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A machine as a fresh process sees it, with nothing of ours on its devices."""

    machine: Machine
    identity: MachineIdentity
    limits: MachineLimits | None
    """What a probe has put on record."""
    baseline_bytes: int
    """Host memory of a process that has done nothing but open the devices."""


def take_survey(device: str | list[str] | None, path: Path) -> Survey:
    """Look at the machine. ``path``: a file of the checkpoint, for its file system's limits.

    ConfigError if a device cannot be opened, with its line.
    """
    answer = _ask({"device": device, "path": str(path)}, f"device={device!r}: ")
    survey: Survey = Form().read(Survey, answer, "survey")
    return survey


def ask_engine(spec: TrialSpec, candidates: Sequence[Choice]) -> list[Mapping[str, Any] | str]:
    """By candidate, the streamer's options in an engine with these settings, or why there is none.

    ConfigError if the engine cannot be had at all, with its line.
    """
    question = {"engine": spec.engine, "model": spec.model, "candidates": candidates}
    answers = _ask(question, "")
    return [answer if isinstance(answer, str) else decode_model(answer) for answer in answers]


def ask_streamed(spec: TrialSpec) -> Streamed:
    """What a pass of a streamed model goes through, of which the model's own code knows.

    ConfigError if it cannot be opened, with its line.
    """
    setup = None if spec.setup_fn is None else asdict(spec.setup_fn)
    answer = _ask({"streamed": spec.model, "setup_fn": setup}, "")
    found: Streamed = pickle.loads(base64.b64decode(answer))
    return found


def _ask(question: Mapping[str, Any], about: str) -> Any:
    """The answer of a fresh process. ConfigError, which begins with ``about``, if it has none."""
    request = child_request(f"{__package__}.surveyor", **question)
    try:
        process = subprocess.run(
            [sys.executable, "-P", str(CHILD), "0"],
            input=json.dumps(request),
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
