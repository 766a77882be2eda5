"""Every option of a streamer, written once: its type, its default, what is allowed, its words.

From this table come the keywords of the constructor, ``from_checkpoint``, ``plan_checkpoint``, the
checks of :class:`.settings.Settings`, the arguments of the commands, what the tuner searches, and
README's table (docs/option_table.py). Imports nothing large: the commands' help needs it.
"""
# Annotations are evaluated here (there is no __future__ import): they are the table.

import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar, Union, get_args

from ..errors import ConfigError
from .budget import parse_bytes

if TYPE_CHECKING:
    import torch

OnCopy = Callable[[int, object], None]
"""``on_copy(layer_idx, stream)``: called after a layer's copies are enqueued on ``stream``."""
ReadMode = Literal["auto", "buffered", "direct", "mapped"]
"""How files are read: "buffered" through the page cache, "direct" past it; "mapped" takes the page
cache itself for the host's memory; "auto" is what suits the memory there is."""
Experts = Literal["whole", "demand"]
"""Which experts of a mixture come to the device: all of a layer, or those that are asked for."""
Bytes = int | str
"""A number of bytes, or a string such as "6GiB"."""
DeviceName = Union[str, "torch.device"]
Door = TypeVar("Door", bound=Callable[..., Any])

MAX_SLOTS = 4096
MAX_READ_THREADS = 256
MAX_EXPERT_SLOTS = 1_000_000
MAX_HOST_LAYERS = 1_000_000
AUTO = "auto"


def count_or_auto(text: str) -> int | str:
    """A number of layers, or "auto"."""
    return AUTO if text.lower() == AUTO else int(text)


@dataclass(frozen=True, slots=True)
class Kind:
    """What may be given for an option."""

    check: Callable[[str, Any], object]
    """Of its name and a value that is not None: raises ConfigError."""
    metavar: str = ""
    """What stands for the value in a command's help, "N" for a whole number; "": none takes it."""
    read: Callable[[str], Any] = str
    """What a command makes of its argument."""


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option beside its type."""

    meaning: str
    """Markdown, on one line."""
    words: str = "None"
    """The default, for people: what None stands for."""
    kind: Kind | None = None
    """None: anything, and no command takes it."""
    default: object = None
    """Of the keyword; None does the same."""


def check_count(name: str, value: object, low: int, high: int) -> None:
    """ConfigError unless ``value`` is an int from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}: must be an int from {low} to {high}")
    if not low <= value <= high:
        raise ConfigError(f"{name}={value}: must be from {low} to {high}")


def count(text: str) -> int:
    """Layers of a pool; "none" is 0."""
    return 0 if text.lower() == "none" else int(text)


def _check_budget(name: str, value: Any) -> None:
    if value != "auto":
        parse_bytes(name, value)


def _check_reserve(name: str, value: Any) -> None:
    for one in value if isinstance(value, list | tuple) else (value,):
        parse_bytes(name, one)


def _check_mode(name: str, value: object) -> None:
    if value not in get_args(ReadMode):
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(get_args(ReadMode))}")


def _check_experts(name: str, value: object) -> None:
    if value not in get_args(Experts):
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(get_args(Experts))}")


def _check_names(name: str, value: object) -> None:
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: must be a list of tensor names")


def _check_host_layers(name: str, value: Any) -> None:
    if value == AUTO:
        return
    if isinstance(value, int):
        check_count(name, value, 0, MAX_HOST_LAYERS)
        return
    if isinstance(value, str) or not isinstance(value, Collection):
        raise ConfigError(f"{name}={value!r}: must be a number of layers, or their indices")
    for index in value:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ConfigError(f"{name}: {index!r} is no index of a layer")


def _number(low: int, high: int, read: Callable[[str], int] = int) -> Kind:
    return Kind(lambda name, value: check_count(name, value, low, high), "N", read)


_POOL = _number(0, MAX_SLOTS, count)
_BUDGET = Kind(_check_budget, "BYTES")
_BATCH = Option("layers each step hands on at a time (None: 1)", kind=_number(1, MAX_SLOTS))


class PoolOptions(TypedDict, total=False):
    """The pools, and what is handed on out of each at a time: the tuner searches them."""

    n_gpu: Annotated[int | None, Option(
        "layers held ahead on the device, beside the one in use; if it is not named, 4 with more "
        "than two devices, and fewer where `device_budget` has no room", "2", _POOL,
    )]  # fmt: skip
    n_cpu_pinned: Annotated[int | None, Option(
        "layers held ahead in page-locked host memory; 0: no such pool", "None", _POOL,
    )]  # fmt: skip
    n_cpu: Annotated[int | None, Option(
        "layers held ahead in pageable host memory; 0: no such pool. With neither pool, layers "
        "pass through a small page-locked ring, part by part", "None", _POOL,
    )]  # fmt: skip
    batch_gpu: Annotated[int | None, _BATCH]
    batch_cpu_pinned: Annotated[int | None, _BATCH]
    batch_cpu: Annotated[int | None, _BATCH]


class TierOptions(TypedDict, total=False):
    """How files are read, what memory holds layers for good, and which are computed in host memory:
    the tuner searches them, too."""

    read_mode: Annotated[ReadMode | None, Option(
        '`"mapped"`, `"direct"`, `"buffered"`, or what suits the memory there is',
        "auto", Kind(_check_mode, "MODE"), "auto",
    )]  # fmt: skip
    read_threads: Annotated[int | None, Option(
        "threads that read, for each device; if neither they nor `read_chunk` are named, direct "
        "reads take what `probe` found to be the fastest here", "8", _number(1, MAX_READ_THREADS),
    )]  # fmt: skip
    read_chunk: Annotated[int | None, Option(
        "bytes one thread reads at a stretch: 1 MiB in direct reads through a ring, else 8 MiB",
        "1 or 8 MiB", _number(4096, 1 << 30),
    )]  # fmt: skip
    device_budget: Annotated[Bytes | None, Option(
        'bytes of each device to use, `"6GiB"` or `"auto"` (what is free less a tenth): what the '
        "slots leave holds layers for good; None: slots only", "None", _BUDGET,
    )]  # fmt: skip
    host_budget: Annotated[Bytes | None, Option(
        "the same for host memory; None: slots, or the page cache if it holds the model",
        "None", _BUDGET,
    )]  # fmt: skip
    host_layers: Annotated[int | Collection[int] | Literal["auto"] | None, Option(
        "layers that stay in host memory and are handed out there, on the CPU, while others "
        'stream: so many, evenly spread, the indices of certain ones, or `"auto"`: as many as end '
        "with the others, by what `probe` measured; passes that say `on_host=False` stream them, "
        "too. On a CPU they are layers like any other", "none",
        Kind(_check_host_layers, "N", count_or_auto),
    )]  # fmt: skip


class FixedOptions(TypedDict, total=False):
    """The same for all candidates of a tune."""

    reserve_bytes: Annotated[Bytes | Sequence[Bytes] | None, Option(
        "the part of `device_budget` that is yours; of several devices, a list of one each if they "
        "differ", "0", Kind(_check_reserve, "BYTES"), 0,
    )]  # fmt: skip
    tail: Annotated[Sequence[str] | None, Option(
        "names of tensors streamed after the last layer, split by rows (an output head)",
        "none", Kind(_check_names), (),
    )]  # fmt: skip
    layers: Annotated[Sequence[int] | None, Option(
        "indices of the layers to stream, in this order, each once (a stage of a pipeline, every "
        "second one); each keeps the index that it has in the checkpoint", "all",
    )]  # fmt: skip
    on_copy: Annotated[OnCopy | None, Option(
        "`on_copy(layer_idx, stream)`, called on the copier's thread as a layer's copies are "
        "enqueued (on the CPU `stream` is a stand-in without work), before they count as ready",
        "none",
    )]  # fmt: skip


class MoreOptions(TierOptions, FixedOptions, total=False):
    """What the published constructor takes beside its own arguments."""

    device: Annotated[DeviceName | Sequence[DeviceName] | None, Option(
        "a torch device, or several: the i-th layer of a pass goes to device i modulo their number",
        "the GPU, else the CPU",
    )]  # fmt: skip


class Options(PoolOptions, MoreOptions, total=False):
    """All of them: the keywords of ``LayerStreamer.from_checkpoint`` and ``plan_checkpoint``."""

    dtype: Annotated[Union["torch.dtype", None], Option(
        "cast F32, F16 and BF16 tensors to it, on the device", "as stored",
    )]  # fmt: skip
    layer_pattern: Annotated[str | None, Option(
        'prefix of a layer\'s tensors with `{i}`, such as `"decoder.block.{i}."`',
        "found", Kind(lambda name, value: None, "PATTERN"),
    )]  # fmt: skip
    experts: Annotated[Experts | None, Option(
        '`"demand"`: of a mixture\'s experts only those that a layer asks for are brought to the '
        "device; `\"whole\"`: all of them with their layer",
        "whole", Kind(_check_experts, "HOW"), "whole",
    )]  # fmt: skip
    expert_slots: Annotated[int | None, Option(
        'experts that the device holds, with `experts="demand"`; None: as many as `device_budget` '
        "leaves once all else is there", "None",
        _number(1, MAX_EXPERT_SLOTS),
    )]  # fmt: skip
    track_progress: Annotated[bool | None, Option(
        "a progress bar over the layers, on stderr", "False", default=False,
    )]  # fmt: skip


OPTIONS: dict[str, Option] = {
    name: kind.__metadata__[0] for name, kind in Options.__annotations__.items()
}
SEARCHED = (*PoolOptions.__annotations__, *TierOptions.__annotations__)
"""What the tuner tries values of, in the order in which a candidate has them."""


def check_names(given: Mapping[str, object], keywords: Any = Options) -> None:
    """TypeError for a name that is none of the TypedDict's ``keywords``."""
    for name in given:
        if name not in keywords.__annotations__:
            raise TypeError(f"got an unexpected keyword argument {name!r}")


def shows(keywords: Any) -> Callable[[Door], Door]:
    """Decorates what takes ``**options: Unpack[keywords]``: its help names and explains each."""

    def show(door: Door) -> Door:
        signature = inspect.signature(door)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for name, kind in keywords.__annotations__.items():
            default, annotation = OPTIONS[name].default, kind.__origin__
            named.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        door.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        lines = [inspect.cleandoc(door.__doc__ or ""), "", "Options:", ""]
        for names, option in _rows(keywords):
            line = f"* {names} ({option.words}): {option.meaning}"
            lines.append(textwrap.fill(line, 92, subsequent_indent="  "))
        door.__doc__ = "\n".join(lines)
        return door

    return show


def markdown_table() -> str:
    """README's table of them, what everybody looks for first."""
    rows = {names: f"| {names} | {o.words} | {o.meaning} |" for names, o in _rows(Options)}
    first = ("`device`", "`dtype`", "`device_budget`", "`host_budget`")
    listed = [rows[names] for names in sorted(rows, key=lambda names: names not in first)]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *listed])


def _rows(keywords: Any) -> Iterator[tuple[str, Option]]:
    """Options and the names that share one."""
    for option, names in groupby(keywords.__annotations__, OPTIONS.__getitem__):
        yield ", ".join(f"`{name}`" for name in names), option
