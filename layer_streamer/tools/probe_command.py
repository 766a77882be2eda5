"""This machine's limits: disk, memory, and the links to the devices, measured and put on record.

    layer-streamer probe [PATH]

Plans and reports go by them. PATH is a file or a folder with large files on the disk to measure.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .command import add_json, publish, say

if TYPE_CHECKING:
    from ..devices.device import Device
    from ..machine.limits import MachineLimits, MachinePart
    from ..measuring.probe import Place
    from ..measuring.probe_config import ProbeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        help="a file or a directory with large files, which are only read; without it, a "
        "temporary file is written and removed",
    )
    parser.add_argument(
        "--dir", type=Path, help="where the temporary file goes (default: the current directory)"
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="D",
        help="a device to measure, such as cuda:0; may be repeated (default: every GPU)",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="time of one measurement")
    parser.add_argument("--quick", action="store_true", help="a few seconds in all; rougher")
    parser.add_argument(
        "--force", action="store_true", help="measure also what is on record for this machine"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, save, and print the table and the document. ConfigError, StreamerError."""
    from ..measuring.probe import choose_devices, probe
    from ..measuring.probe_config import Journal
    from ..measuring.probe_table import describe, document
    from ..progress import ProgressBar

    place, config = _place(args), _config(args)
    devices = choose_devices(args.device)
    known = None if args.force else _known(devices, config)
    if args.force:
        _forget()
    begun = itertools.count()
    with ProgressBar(unit="measurement", leave=False) as bar:

        def show(name: str, total: int) -> None:
            # Called when a measurement begins: those before it are done.
            bar.total, bar.n = total, next(begun)
            bar.set_description_str(name)

        journal = Journal(show)
        limits = probe(place, devices, config, journal, known)
    if known is not None:
        journal.note(
            f"memory and devices: as measured at {known.measured_at}; --force measures them again"
        )
    table = describe(limits, journal.notes)
    publish(args, table, document(limits, journal.notes, _save(limits)))


def _place(args: argparse.Namespace) -> Place:
    from ..measuring.probe import Place

    if args.path is None:
        return Place(args.dir or Path(), temporary=True)
    if args.dir is not None:
        raise ConfigError(f"--dir={args.dir}: only for a temporary file, but {args.path} is read")
    return Place(args.path, temporary=False)


def _config(args: argparse.Namespace) -> ProbeConfig:
    from ..measuring.probe_config import ProbeConfig, quick_config

    config = quick_config() if args.quick else ProbeConfig()
    return config if args.seconds is None else replace(config, seconds=args.seconds)


def _known(devices: Sequence[Device], config: ProbeConfig) -> MachinePart | None:
    from ..machine.limits import load_limits
    from ..measuring.probe import is_known

    recorded = load_limits()
    if recorded is None or not is_known(recorded.machine, devices, config):
        return None
    return recorded.machine


def _forget() -> None:
    """What engines have measured on this machine, too."""
    from ..machine.products import forget_products

    try:
        forget_products()
    except OSError as error:
        say(f"warning: products of engines are still on record: {error}")


def _save(limits: MachineLimits) -> tuple[Path, ...]:
    from ..machine.limits import save_limits

    try:
        return save_limits(limits)
    except OSError as error:
        say(f"warning: the limits were not saved: {error}")
        return ()
