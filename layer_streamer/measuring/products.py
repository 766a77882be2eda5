"""Products by an engine's own kernels, beside copies: measured once, then taken from the record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from ..devices.accelerator import open_devices
from ..devices.device import Device
from ..machine.limits import ProductRate
from ..machine.products import load_products, save_products
from ..planning.options import DeviceName
from .probe_config import ProbeConfig, buffer_budget
from .probe_products import Multiply, copies_to, measure_beside
from .threads import leave_a_core

logger = logging.getLogger(__name__)

CONFIG = ProbeConfig()
"""As long as a probe takes for one of its measurements."""
Prepare: TypeAlias = Callable[[int], Multiply]


def product_rates(
    device: DeviceName | Sequence[DeviceName] | None, products: Mapping[str, Prepare]
) -> dict[str, tuple[ProductRate, ...]]:
    """How fast the processor multiplies by one token while links are busy: by name, for each of the
    devices that ``device`` names.

    What this machine's record has is taken from it. The rest is measured, a second each, with as
    many threads as leave the streamer a core, and put on record. ``products``: by a name that
    stands for what is multiplied and by which kernels, ``prepare(nbytes)``, which returns
    ``multiply()``: that multiplies one matrix after the other, out of about so many bytes (more
    than caches hold), and returns the bytes of each. It is called on a thread of its own.

    ConfigError where there is too little host memory, StreamerError without memory on a device;
    what ``prepare`` and ``multiply`` raise comes through. Thread rules: one thread.
    """
    of_devices = [_of_device(one, products) for one in open_devices(device)]
    return {name: tuple(rates[name] for rates in of_devices) for name in products}


def _of_device(device: Device, products: Mapping[str, Prepare]) -> dict[str, ProductRate]:
    name = str(device.torch_device)
    with leave_a_core():
        threads = torch.get_num_threads()
        known = load_products(name, threads)
        missing = {kind: prepare for kind, prepare in products.items() if kind not in known}
        if not missing:
            return known
        logger.info("measuring products beside copies to %s, once: %s", name, ", ".join(missing))
        found = _measure(device, missing)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what copies went to is a plan's to use
        try:
            save_products(name, threads, found)
        except OSError as error:
            logger.warning("products are not put on record, and measured again: %s", error)
    return known | found


def _measure(device: Device, products: Mapping[str, Prepare]) -> dict[str, ProductRate]:
    found, half = dict[str, ProductRate](), buffer_budget(CONFIG) // 2
    with copies_to(device, CONFIG, half) as pairs:
        for kind, prepare in products.items():
            rates = measure_beside(device, pairs, prepare(half), CONFIG)
            found[kind] = ProductRate(1, *rates)
    return found
