"""A file of JSON lines that says which experts each pass asked for.

The first line is the header, each other one a pass: how many tokens it took, and what each layer
asked for, in order::

    {"layer_streamer_experts":1,"num_layers":2,"num_experts":8,"top_k":2,"expert_nbytes":96}
    {"tokens":1,"asked":[[0,[3,7]],[1,[0,7]]]}

:mod:`.trace_writer` writes it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..machine.atomic import read_record
from ..machine.records import HUGE, Form
from .policies import Key

logger = logging.getLogger(__name__)

MOST_NBYTES = 64 << 20
"""Of a trace: some 40,000 tokens of 48 layers with 8 experts each."""
MOST_COUNT = 1 << 20
"""No number of layers, experts or tokens is larger."""
MOST_SAID = 60
"""Characters of a line that an error repeats."""
HEAD, VERSION = "layer_streamer_experts", 1
"""How the header begins."""
_HEAD_TEXT = f'{{"{HEAD}":'.encode()


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What a trace is of."""

    num_layers: int
    """Layers of the model; those without experts ask for none."""
    num_experts: int
    """In each layer."""
    top_k: int
    """That one token asks a layer for."""
    expert_nbytes: int | None = None
    """Bytes of one expert, the mean where layers differ; None if that is not known."""


@dataclass(frozen=True, slots=True)
class ExpertPass:
    """What one pass asked for."""

    tokens: int
    """That it took."""
    asked: tuple[tuple[int, tuple[int, ...]], ...]
    """A layer, and the experts that it needed together, all different; in order."""


@dataclass(frozen=True, slots=True)
class Trace:
    """All that a file says."""

    header: TraceHeader
    passes: tuple[ExpertPass, ...]

    @property
    def tokens(self) -> int:
        """Of all passes."""
        return sum(one.tokens for one in self.passes)

    @property
    def layers(self) -> list[int]:
        """Those that asked for experts."""
        return sorted({layer for one in self.passes for layer, _ in one.asked})

    def steps(self, layer: int | None = None) -> Iterator[Sequence[Key]]:
        """What was needed together, of one layer or of all, in order."""
        keys = dict[Key, Key]()  # one of each: there may be millions of steps
        for one in self.passes:
            for asking, experts in one.asked:
                if layer is None or asking == layer:
                    together = [(asking, expert) for expert in experts]
                    yield [keys.setdefault(key, key) for key in together]

    def counts(self, layer: int | None = None) -> Mapping[Key, int]:
        """How often each expert was asked for."""
        return Counter(key for keys in self.steps(layer) for key in keys)


def read_trace(path: Path) -> Trace:
    """The trace in a file. A last line that was torn is left out, with a warning.

    OSError; ConfigError, with the number of the line, for a file that is none, or is damaged.
    """
    try:
        content = read_record(path, MOST_NBYTES)
    except ValueError as error:
        raise ConfigError(f"{path}: a trace of experts that is {error}") from None
    if not content.startswith(_HEAD_TEXT):
        raise ConfigError(
            f"{path}: is no trace of experts, which begins with {_HEAD_TEXT.decode()}"
        )
    first, *lines = content.split(b"\n")
    torn = lines.pop() if lines else first
    number = 1
    try:
        if torn is first:
            raise ValueError("ends within the first line")
        header = _header_of(_parse(first))
        passes = []
        for number, line in enumerate(lines, 2):  # noqa: B007 - for the error
            passes.append(check_pass(header, _parse(line)))
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: {error}") from None
    if torn:
        logger.warning("%s:%d: a torn last line is left out", path, number + 1)
    return Trace(header, tuple(passes))


def check_header(header: TraceHeader) -> None:
    """ValueError for one that no trace can have."""
    for name, most in (
        ("num_layers", MOST_COUNT), ("num_experts", MOST_COUNT), ("top_k", header.num_experts),
        ("expert_nbytes", HUGE),
    ):  # fmt: skip
        value = getattr(header, name)
        if not 1 <= (1 if value is None else value) <= most:
            raise ValueError(f"{name}={value}: must be from 1 to {most}")


def check_pass(header: TraceHeader, document: Any) -> ExpertPass:
    """A pass, out of what JSON has of it; ValueError for what cannot be one of this header."""
    if not isinstance(document, dict) or set(document) != {"tokens", "asked"}:
        raise ValueError("a pass has tokens and asked, and nothing else")
    tokens, asked = document["tokens"], document["asked"]
    if not _is_count(tokens, MOST_COUNT) or not tokens:
        raise ValueError(f"tokens={_said(tokens)}: must be from 1 to {MOST_COUNT - 1}")
    if not isinstance(asked, list | tuple):
        raise ValueError(f"asked={_said(asked)}: must be a list")
    return ExpertPass(tokens, tuple(_step_of(header, step) for step in asked))


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"not JSON: {reason}") from None


def _header_of(document: dict[str, Any]) -> TraceHeader:
    """ValueError for what is none of this version."""
    version = document.pop(HEAD)
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"a trace of version {_said(version)}, not {VERSION}")
    header: TraceHeader = Form().read(TraceHeader, document, "header")
    check_header(header)
    return header


def _step_of(header: TraceHeader, step: Any) -> tuple[int, tuple[int, ...]]:
    layer, experts = step if isinstance(step, list | tuple) and len(step) == 2 else (0, None)
    if not isinstance(experts, list | tuple):
        raise ValueError(f"asked has {_said(step)}: must be a layer and a list of its experts")
    if not _is_count(layer, header.num_layers):
        raise ValueError(f"asked of layer {_said(layer)}: there are {header.num_layers} layers")
    for expert in experts:
        if not _is_count(expert, header.num_experts):
            there = f"a layer has {header.num_experts}"
            raise ValueError(f"layer {layer} asked for expert {_said(expert)}: {there}")
    if len({*experts}) != len(experts):
        raise ValueError(f"layer {layer} asked for an expert twice: {_said(experts)}")
    return layer, tuple(experts)


def _is_count(value: Any, bound: int) -> bool:
    """A whole number from 0 to below ``bound``."""
    return type(value) is int and 0 <= value < bound


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}..."
