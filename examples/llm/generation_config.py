"""What a model's makers say of generating with it: generation_config.json.

Such files are written by hand and by many tools. Whatever one holds, the model opens: what can be
used is, and a note names what cannot, with the file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layer_streamer import CheckpointError, read_json

from .text.sampling_options import Sampling, as_whole, default_sampling

NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0.0, "typical_p": 1.0, "top_h": None,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}  # fmt: skip
"""Fields that change which tokens transformers chooses and that this engine does not follow, each
with the value, beside null, with which it changes nothing."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What can be used of a generation_config.json."""

    sampling: Sampling
    eos_ids: frozenset[int]
    """Ids that end a text."""
    notes: tuple[str, ...] = ()
    """A line for each thing that cannot be used, with the file's name."""


def read_generation_config(directory: Path) -> GenerationConfig:
    """That of a model's directory; without the file, what transformers takes then. Never an
    error."""
    path, notes = directory / "generation_config.json", list[str]()

    def complain(text: str) -> None:
        notes.append(f"{path}: {' '.join(text.split())}: not used")

    fields = _read(path, complain) if path.is_file() else {}
    sampling = default_sampling(fields, complain)
    eos_ids = _ids("eos_token_id", fields.get("eos_token_id"), complain)
    for name, neutral in NEUTRAL.items():
        value = fields.get(name)
        if value is not None and value != neutral:
            complain(f"{name}={reprlib.repr(value)}: this engine has no such option")
    return GenerationConfig(sampling, eos_ids, tuple(notes))


def _read(path: Path, complain: Callable[[str], None]) -> dict[str, Any]:
    try:
        found = read_json(path)
    except CheckpointError as error:
        complain(str(error).removeprefix(f"{path}: "))
        return {}
    if not isinstance(found, dict):
        complain("not a JSON object")
        return {}
    return found


def _ids(name: str, value: Any, complain: Callable[[str], None]) -> frozenset[int]:
    """Token ids of a field that may hold one, several or none."""
    if value is None:
        return frozenset()
    found = set()
    for item in map(as_whole, value if isinstance(value, list) else [value]):
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            found.add(item)
        else:
            complain(f"{name}={reprlib.repr(item)}: must be a token id, or a list of them")
    return frozenset(found)
