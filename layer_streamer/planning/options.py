"""Every option of a streamer, for people: what README's table and the commands' help say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["layers", "number", "bytes", "word"]
"""What a command line takes for it: a count from 0, one from 1, "6GiB" or a number, a word."""


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table."""

    names: tuple[str, ...]
    """Keywords of ``LayerStreamer.from_checkpoint`` that share a row."""
    default: str
    meaning: str
    """Markdown, on one line."""
    kind: Kind | None = None
    """None: not for the command line."""


OPTIONS = (
    Option(
        ("device",),
        "the GPU, else the CPU",
        "a torch device, or several: layer i goes to device i modulo their number",
    ),
    Option(("dtype",), "as stored", "cast F32, F16 and BF16 tensors to it, on the device"),
    Option(("n_gpu",), "2", "layers held ahead on the device, beside the one in use", "layers"),
    Option(
        ("n_cpu_pinned",),
        "None",
        "layers held ahead in page-locked host memory; 0: no such pool",
        "layers",
    ),
    Option(
        ("n_cpu",),
        "None",
        "layers held ahead in pageable host memory; 0: no such pool. With neither pool, layers "
        "pass through a small page-locked ring, part by part",
        "layers",
    ),
    Option(
        ("batch_gpu", "batch_cpu_pinned", "batch_cpu"),
        "None",
        "layers each step hands on at a time (None: 1)",
        "number",
    ),
    Option(
        ("device_budget",),
        "None",
        'bytes of each device to use, `"6GiB"` or `"auto"` (what is free less a tenth): what the '
        "slots leave holds layers for good; None: slots only",
        "bytes",
    ),
    Option(
        ("host_budget",),
        "None",
        "the same for host memory; None: slots, or the page cache if it holds the model",
        "bytes",
    ),
    Option(("reserve_bytes",), "0", "the part of `device_budget` that is yours", "bytes"),
    Option(
        ("read_mode",),
        "auto",
        '`"mapped"`, `"direct"`, `"buffered"`, or what suits the memory there is',
        "word",
    ),
    Option(
        ("read_threads",),
        "8",
        "threads that read, for each device; if neither is named, direct reads take what `probe` "
        "found to be the fastest here",
        "number",
    ),
    Option(
        ("read_chunk",),
        "1 or 8 MiB",
        "bytes one thread reads at a stretch: 1 MiB in direct reads through a ring, else 8 MiB",
        "number",
    ),
    Option(
        ("tail",),
        "none",
        "names of tensors streamed after the last layer, split by rows (an output head)",
    ),
    Option(
        ("layers",),
        "all",
        "indices of the layers to stream, in this order, each once (a stage of a pipeline, every "
        "second one)",
    ),
    Option(
        ("on_copy",),
        "none",
        "`on_copy(layer_idx, stream)`, called as a layer's copies are enqueued",
    ),
    Option(
        ("layer_pattern",),
        "found",
        'prefix of a layer\'s tensors with `{i}`, such as `"decoder.block.{i}."`',
        "word",
    ),
    Option(("track_progress",), "False", "a progress bar over the layers"),
)


def markdown_table() -> str:
    """README's table of them."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in OPTIONS:
        names = ", ".join(f"`{name}`" for name in option.names)
        rows.append(f"| {names} | {option.default} | {option.meaning} |")
    return "\n".join(rows)
