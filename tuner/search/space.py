"""The candidates: every combination of the values to try, equal ones once. Pure."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...planning.budget import format_bytes, parse_bytes
from ...planning.options import MAX_SLOTS, SEARCHED, check_count
from ...planning.settings import Settings
from ..trials.record import Choice

MIB = 1 << 20
POOLS = (
    ("n_gpu", "batch_gpu"),
    ("n_cpu_pinned", "batch_cpu_pinned"),
    ("n_cpu", "batch_cpu"),
)
"""Each pool's size, and the number of layers handed on out of it at a time."""
_POOL_SIZES, _BATCHES = zip(*POOLS, strict=True)
_BUDGETS = ("device_budget", "host_budget")
AXES = SEARCHED
"""Settings that can be searched, in the order in which a candidate has them."""
MAX_COMBINATIONS = 100_000

Values = Sequence[int | str | None]
Axes = Mapping[str, Values]
"""By setting, the values to try; a setting that is not there is left to the streamer."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the user grants, bytes; None: no bound."""

    max_device_bytes: int | None = None
    """Of each device."""
    max_host_bytes: int | None = None

    def excess(self, device: int, host: int, what: str) -> str:
        """Why so many bytes of a device and of host memory are more than was granted; "" if they
        are not. ``what`` takes them: "the plan takes"."""
        for name, used in (("max_device_bytes", device), ("max_host_bytes", host)):
            bound = getattr(self, name)
            if bound is not None and used > bound:
                return f"{name}={bound}: {what} {format_bytes(used)}"
        return ""


def default_axes(grants: Bounds, num_cores: int, *, unified: bool) -> dict[str, Values]:
    """Values that are worth trying on such a machine. ``grants``: for the streamer alone.
    ``unified``: True if the device is the CPU."""
    few_cores = num_cores <= 4
    axes: dict[str, Values] = dict.fromkeys(AXES, (None,))
    axes["n_cpu_pinned"] = axes["n_cpu"] = (0,)
    axes["read_mode"] = ("mapped", "buffered", "direct")
    if unified:
        axes["n_gpu"] = (1, 2, 4, 8)
        axes["read_threads"] = (1, 2, 4) if few_cores else (2, 4, 8)
    else:
        axes["n_gpu"] = (1, 2, 4)
        axes["n_cpu_pinned"] = (0, 2, 4)
        axes["read_threads"] = (2, 4, 8) if few_cores else (4, 8, 16)
    axes["read_chunk"] = (MIB, 8 * MIB)
    device_bytes, host_bytes = grants.max_device_bytes, grants.max_host_bytes
    if unified:
        # Both are budgets of the one memory there is: the smaller one is enough.
        device_bytes = min((b for b in (device_bytes, host_bytes) if b is not None), default=None)
        host_bytes = None
    if device_bytes is not None:
        # What compute takes beside the streamer is not known before it has run.
        axes["device_budget"] = (device_bytes * 19 // 20, device_bytes * 3 // 4, None)
    if host_bytes is not None:
        axes["host_budget"] = (host_bytes * 19 // 20, None)
    if device_bytes is not None or host_bytes is not None:
        axes["read_chunk"] = (8 * MIB,)
        axes["read_threads"] = axes["read_threads"][1:]
        if not unified:
            axes["n_cpu_pinned"] = (0, 4)
    return axes


def with_host_layers(axes: Axes, counts: Values) -> dict[str, Values]:
    """The same with ``counts`` of host layers to try: host memory holds what streams then, so how
    it gets there counts once, and not all ways of reading are tried."""
    fewer: dict[str, Values] = {"n_cpu_pinned": (0,), "read_threads": axes["read_threads"][-2:-1]}
    return {**axes, **fewer, "read_chunk": (8 * MIB,), "host_layers": counts}


def check_axes(axes: Mapping[str, Values | None]) -> dict[str, Values]:
    """The axes that have values, each value once; None as the size of a host pool is 0.

    ConfigError for a value that cannot work.
    """
    checked = dict[str, Values]()
    for name in AXES:
        values = axes.get(name)
        if values is None:
            continue
        if isinstance(values, str | bytes) or not isinstance(values, Sequence):
            raise ConfigError(f"{name}_values={values!r}: must be a list of values")
        if not values:
            raise ConfigError(f"{name}_values=[]: must have at least one value")
        for value in values:
            try:
                if name == "n_gpu":  # the one pool that is always there
                    check_count(name, value, 0, MAX_SLOTS)
                if name == "host_layers" and not isinstance(value, int | str | None):
                    raise ConfigError(f"{name}={value!r}: must be a number of layers, or 'auto'")
                Settings(**_named({name: value}))
            except ConfigError as error:
                raise ConfigError(f"{name}_values: {error}") from None
        checked[name] = tuple(dict.fromkeys(name_absent_pools({name: v})[name] for v in values))
    total = math.prod(len(values) for values in checked.values())
    if total > MAX_COMBINATIONS:
        raise ConfigError(
            f"the values make {total} combinations: must be at most {MAX_COMBINATIONS}"
        )
    return checked


def candidates(axes: Axes, *, unified: bool, first: Iterable[Choice] = ()) -> list[Choice]:
    """``first``, then the product of the axes in their order, all in plain form; of equal ones the
    first alone."""
    found: dict[str, Choice] = {}
    product = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    for settings in itertools.chain(first, product):
        form = plain(settings, unified=unified)
        found.setdefault(make_key(form, unified=unified), form)
    return list(found.values())


def engine_defaults(axes: Axes) -> tuple[Choice, Choice]:
    """What is tried first of an engine, and all others are compared with: its defaults, and these
    with the budgets."""
    budgets = {
        name: next((value for value in axes.get(name, ()) if value is not None), None)
        for name in _BUDGETS
    }
    return {}, budgets


def plain(settings: Choice, *, unified: bool) -> dict[str, int | str | None]:
    """The same settings without what has no effect: a shortest form, in the order of AXES.

    A pool that is not there is 0; a batch is at most its pool's slots, and one layer at a time is
    None; mapped files need no host pools. On the CPU (``unified``) all three are parts of one pool.
    Options at their default are left out, on the CPU host layers as well, except that a host pool
    that is named stays named: that rules mapped files out under "auto".
    """
    named = _named(settings)
    if named.get("read_mode") == "mapped" and not unified:
        for name in ("n_cpu_pinned", "n_cpu", "batch_cpu_pinned", "batch_cpu"):
            named.pop(name, None)
    for n, batch in POOLS:
        if n in named and not unified:
            named[batch] = min(named.get(batch) or 1, named[n] + 1)
        if named.get(batch) in (None, 1):
            named.pop(batch, None)
    if "n_cpu_pinned" in named and not named.get("n_cpu"):
        named.pop("n_cpu", None)
    for name in _BUDGETS:
        if named.get(name) not in (None, "auto"):
            named[name] = parse_bytes(name, named[name])
    idle = {"read_mode": "auto", "host_layers": named.get("host_layers") if unified else 0}
    return {name: named[name] for name in AXES if name in named and named[name] != idle.get(name)}


def make_key(settings: Choice, *, unified: bool) -> str:
    """What two settings have in common exactly if they are the same configuration.

    ``unified``: on the CPU the three pools are one, and the largest batch is the batch.
    """
    form: dict[str, Any] = plain(settings, unified=unified)
    if unified:
        whole = Settings(**form)
        batches = [form.pop(batch, None) or 1 for batch in _BATCHES]
        slots = whole.num_device + whole.num_pinned + whole.num_pageable + 1
        form = {name: value for name, value in form.items() if name not in _POOL_SIZES}
        form |= {"slots": slots, "batch": min(max(batches), slots)}
    elif form.get("read_mode") == "mapped":
        # Threads read nothing during passes.
        form = {key: form[key] for key in form if key not in ("read_threads", "read_chunk")}
    return json.dumps(form, sort_keys=True)


def complete(settings: Choice, axes: Axes) -> dict[str, int | str | None]:
    """``settings`` with every searched option named, for whoever asked for its values. No layer of
    the host is 0."""
    named = {name: settings.get(name) for name in AXES if name in axes or name in settings}
    whole = name_absent_pools(named)
    if whole.get("read_mode", "") is None:
        whole["read_mode"] = "auto"
    if whole.get("host_layers", 0) is None:
        whole["host_layers"] = 0
    return whole


def name_absent_pools(settings: Choice) -> dict[str, int | str | None]:
    """The same with 0 for a pool that is None: in values to try, and in results of before."""
    return {
        name: 0 if value is None and name in _POOL_SIZES else value
        for name, value in settings.items()
    }


def _named(settings: Choice) -> dict[str, Any]:
    """Without the options that None leaves at their default."""
    named = name_absent_pools(settings)
    return {name: value for name, value in named.items() if value is not None}
