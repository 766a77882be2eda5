"""Where each layer of a checkpoint would live, and the seconds a pass that follow from it.

    layer-streamer plan MODEL --device-budget 6GiB --host-budget 16GiB
    layer-streamer plan MODEL --device-budget 8GiB --draft self
    layer-streamer plan MODEL --device-budget 8GiB --experts demand

With a draft it is the language model engine's plan, and what several tokens a pass would come to.
Nothing is opened but headers, nothing is allocated (but by the engine's --host-layers auto, which
measures products once a machine). The rates are those that ``layer-streamer probe`` has put on
record for this machine, or those that are named.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from textwrap import indent
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .command import (
    add_devices,
    add_json,
    add_model,
    add_streamer_options,
    publish,
    streamer_options,
)
from .engine_options import read_model

if TYPE_CHECKING:
    from ..checkpoint.manifest import Manifest
    from ..experts.forecast import Forecast
    from ..planning.plan import Plan

TOKENS = (1, 2, 5, 10)
"""A pass, for which tokens a second are predicted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_model(parser)
    add_devices(parser)
    parser.add_argument("--read-rate", type=float, metavar="GB/S", help="of the disk")
    parser.add_argument("--copy-rate", type=float, metavar="GB/S", help="of each device's link")
    draft_help = "plan the engine with a draft: a small model with the same tokenizer, or self"
    parser.add_argument("--draft", metavar="MODEL", help=draft_help)
    add_json(parser)
    add_streamer_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan of a streamer that is not opened, and its JSON."""
    if args.draft is not None:
        _plan_engine(args)
        return
    from ..assembly import draw_plan
    from ..checkpoint.formats import read_manifest
    from ..devices.accelerator import open_devices
    from ..planning.settings import Settings

    settings = Settings(**streamer_options(args))
    manifest = read_manifest(args.model, settings.asked["layer_pattern"])
    devices = open_devices(settings.asked["device"])
    plan = draw_plan(manifest, devices, settings, _rates(args))
    text, document = f"{args.model}: {len(plan.tiers)} layers\n{plan}", plan.document()
    if plan.expert_slots and (found := _forecast(manifest, plan)) is not None:
        text += "\n" + indent(str(found), "  ")
        document["experts"] = found.document()
    publish(args, text, json.dumps(document))


def _forecast(manifest: Manifest, plan: Plan) -> Forecast | None:
    """What experts on demand would come to; None where no config says how many a token needs."""
    from ..checkpoint.experts import split_experts
    from ..checkpoint.json_file import read_json
    from ..experts.forecast import experts_per_token, forecast

    fields: Mapping[str, Any] = manifest.metadata
    if manifest.format != "gguf":
        folder = manifest.path if manifest.path.is_dir() else manifest.path.parent
        config = folder / "config.json"
        fields = read_json(config) if config.is_file() else {}
    per_token = experts_per_token(fields) if isinstance(fields, Mapping) else None
    layers = [split_experts(manifest.layers[i])[1] for i in plan.layers if i < manifest.num_layers]
    experts = [layer for layer in layers if layer is not None]
    if per_token is None:
        return None
    slots = (plan.expert_slots, plan.expert_bytes)
    rate = None if plan.machine.unified else plan.rates.copy[0]
    return forecast(experts, per_token, slots, plan.predicted_seconds, rate)


def _plan_engine(args: argparse.Namespace) -> None:
    """Print the engine's plan with a draft, and tokens a second for several tokens a pass."""
    from ..assembly import draw_plan
    from ..devices.accelerator import open_devices
    from ..planning.settings import Settings

    model = read_model(args)
    from ..llm.parts import preview

    options = streamer_options(args) | {"device": args.device}
    options.pop("layer_pattern", None)  # the model's, which has been read
    plan = preview(model, args.draft, **options)
    settings = Settings(**plan.options)
    devices = open_devices(settings.asked["device"])
    drawn = draw_plan(model.manifest, devices, settings, _rates(args))
    seconds, lines = drawn.predicted_seconds, [str(plan)]
    if seconds == 0:
        lines.append("nothing is streamed: nothing is drafted")
    elif seconds is not None:
        rates = ", ".join(f"{count / seconds:.1f} at {count}" for count in TOKENS)
        lines.append(
            f"predicted: {seconds:.4f} s a pass; tokens a second by tokens a pass: {rates} "
            "(the draft's own time apart)"
        )
    else:
        lines.append("no prediction: rates are unknown (layer-streamer probe measures them)")
    text = f"{args.model}, draft {args.draft}\n" + "\n".join(lines)
    parts: Any = [dict(some) for some in plan.devices] if plan.others else dict(plan.device)
    publish(args, text, json.dumps(drawn.document() | {"device_parts": parts}))


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
