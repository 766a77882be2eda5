"""Where each layer of a checkpoint would live, and the seconds a pass that follow from it.

    layer-streamer plan MODEL --device-budget 6GiB --host-budget 16GiB

Nothing is opened but headers, nothing is allocated. The rates are those that ``layer-streamer
probe`` has put on record for this machine, or those that are named.
"""

from __future__ import annotations

import argparse
import json
import math

from ..errors import ConfigError
from .command import (
    add_devices,
    add_json,
    add_model,
    add_streamer_options,
    publish,
    streamer_options,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_model(parser)
    add_devices(parser)
    parser.add_argument("--read-rate", type=float, metavar="GB/S", help="of the disk")
    parser.add_argument("--copy-rate", type=float, metavar="GB/S", help="of each device's link")
    add_json(parser)
    add_streamer_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan of a streamer that is not opened, and its JSON."""
    from ..assembly import draw_plan
    from ..checkpoint.formats import read_manifest
    from ..devices.accelerator import open_devices
    from ..planning.settings import Settings

    settings = Settings(**streamer_options(args))
    manifest = read_manifest(args.model, settings.asked["layer_pattern"])
    devices = open_devices(settings.asked["device"])
    plan = draw_plan(manifest, devices, settings, _rates(args))
    text = f"{args.model}: {len(plan.tiers)} layers\n{plan}"
    publish(args, text, json.dumps(plan.document()))


def _rates(args: argparse.Namespace) -> dict[str, float]:
    """The rates that were named, bytes a second. Raises ConfigError."""
    given = {}
    for name in ("read", "copy"):
        rate = vars(args)[f"{name}_rate"]
        if rate is None:
            continue
        if not 0 < rate < math.inf:
            raise ConfigError(f"--{name}-rate={rate}: must be above 0 (GB/s), and finite")
        given[name] = rate * 1e9
    return given
