"""How many of a mixture's experts would be in their slots when asked for, by a saved trace.

    layer-streamer experts trace.jsonl --slots 24
    layer-streamer experts trace.jsonl --slots 24 --slots 48 --fixed-from yesterday.jsonl

Each policy is run over what the trace asked for, with a pool of so many slots for each layer, and
with one of as many in all for all layers; beside them the most that any policy could hit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..experts.policies import POLICIES
from .command import add_json, at_least, publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    trace_help = "a file of JSON lines that says which experts passes asked for (docs/moe.md)"
    parser.add_argument("trace", metavar="TRACE", type=Path, help=trace_help)
    slots_help = "for each layer; may be repeated"
    parser.add_argument(
        "--slots", action="append", type=at_least(1), metavar="N", required=True, help=slots_help
    )
    policy_help = f"{', '.join(POLICIES)}; may be repeated (default: all)"
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, metavar="P", help=policy_help
    )
    fixed_help = "what the fixed set is counted from (default: TRACE itself)"
    parser.add_argument("--fixed-from", type=Path, metavar="TRACE", help=fixed_help)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table and the document."""
    from ..experts.report import describe, document
    from ..experts.simulate import simulate
    from ..experts.trace import read_trace
    from ..progress import ProgressBar

    trace = read_trace(args.trace)
    if not trace.passes:
        raise ConfigError(f"{args.trace}: a trace without a pass")
    source = args.fixed_from or args.trace
    counted = read_trace(source) if args.fixed_from else trace
    slots, policies = list(dict.fromkeys(args.slots)), list(dict.fromkeys(args.policy or POLICIES))
    found = []
    with ProgressBar(
        total=2 * len(slots) * (len(policies) + 1), unit="simulation", leave=False
    ) as bar:
        for one in simulate(trace, slots, policies, counted):
            found.append(one)
            bar.update()
    of = (args.trace, trace, found, source)
    publish(args, describe(*of), document(*of))
