"""The record of products that engines compute on the processor: by name, how fast beside copies.

It lies beside a probe's limits. An engine has kernels of its own, and knows what it names by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .atomic import write_atomically
from .identity import MachineIdentity, this_machine
from .limits import ProductRate, encode, load_part, machine_folder

MOST_RATES = 512
"""On record; the oldest give way."""


@dataclass(frozen=True, slots=True)
class NamedRate:
    """Of one kind of product, beside copies to one device."""

    name: str
    device: str
    """torch's name of it, such as "cuda:0"."""
    num_threads: int
    """torch's, while it was measured."""
    rate: ProductRate


@dataclass(frozen=True, slots=True)
class ProductsPart:
    """All that are known of a machine."""

    identity: MachineIdentity
    rates: tuple[NamedRate, ...]


def load_products(device: str, num_threads: int) -> dict[str, ProductRate]:
    """By name, what is on record for this machine, with its driver and torch, that device and so
    many threads of torch. A record that cannot be read is as good as none, and is logged."""
    of_device = (one for one in _on_record() if _key(one)[1:] == (device, num_threads))
    return {one.name: one.rate for one in of_device}


def save_products(device: str, num_threads: int, rates: Mapping[str, ProductRate]) -> Path:
    """Put ``rates``, by name, on record beside what is there; the file. Raises OSError."""
    new = [NamedRate(name, device, num_threads, rate) for name, rate in rates.items()]
    replaced = set(map(_key, new))
    kept = [one for one in _on_record() if _key(one) not in replaced]
    part = ProductsPart(this_machine(), tuple([*kept, *new][-MOST_RATES:]))
    path = _path(make=True)
    write_atomically(path, json.dumps(encode(part)))
    return path


def forget_products() -> None:
    """Have all measured anew. Raises OSError."""
    _path().unlink(missing_ok=True)


def _key(one: NamedRate) -> tuple[str, str, int]:
    return one.name, one.device, one.num_threads


def _on_record() -> tuple[NamedRate, ...]:
    found = load_part(_path(), ProductsPart)
    return found.rates if found is not None and found.identity == this_machine() else ()


def _path(*, make: bool = False) -> Path:
    return machine_folder(this_machine(), make=make) / "products.json"
