"""Slots on a device for experts that are alike, and who is in them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import torch

from ..devices.device import Device
from ..devices.staging import Staging
from ..errors import StreamerError
from ..experts.policies import Key, Policy
from ..experts.slots import Held, Placing, SlotTable
from ..planning.layout import View
from ..transport.memory import Watch, allocate


class ExpertPool:
    """``count`` slots in memory that is taken once. Thread rules: the thread that runs the pass,
    which may be interrupted anywhere: then the next use begins with empty slots."""

    def __init__(
        self, views: Sequence[View], slot_nbytes: int, count: int, policy: Policy, device: Device
    ) -> None:
        """``views``: the tensors of an expert in its slot of ``slot_nbytes``, a multiple of what
        aligns them all."""
        self.slot_nbytes = slot_nbytes
        self.slab = allocate(count * slot_nbytes, device)
        self.numbers = Staging(device)
        self._table = SlotTable(count, policy)
        self._watch = Watch([self.slab])
        (handed_out,) = self._watch.memory
        with torch.inference_mode(False):
            banks = {view.key: _bank(handed_out, view, slot_nbytes, count) for view in views}
        self.banks = dict(sorted(banks.items()))
        self.derived = dict[Hashable, Any]()

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: Key) -> bool:
        return key in self._table

    @property
    def departures(self) -> int:
        """See ``SlotTable``."""
        return self._table.departures

    def there(self, keys: Iterable[Key]) -> dict[Key, int]:
        """See ``SlotTable``."""
        return self._table.there(keys)

    def place(
        self, keys: Sequence[Key], busy: Collection[int] = (), *, asked: bool = True
    ) -> Placing:
        """Slots for experts, none of those that are ``busy`` anew, as of ``SlotTable``. What is
        missing is to be brought, and then :meth:`filled` called, or :meth:`failed`. ConfigError for
        more than there are slots.

        A backward that needs what was in a slot that is filled again is to raise from here on.
        """
        placing = self._table.place(keys, busy, asked=asked)
        if placing.missing:
            self._watch.expire()
        return placing

    def filled(self) -> None:
        """What was placed is in its slots, or on its way."""
        self._table.settle()

    def failed(self, keys: Iterable[Key]) -> None:
        """These could not be brought: their slots hold nothing."""
        for key in keys:
            self._table.drop(key)
        self._table.settle()

    @property
    def protected(self) -> int | None:
        """See ``SlotTable``."""
        return self._table.protected

    def lend(self) -> Held | None:
        """See ``SlotTable``. A backward that needs what is in any slot is to raise from here on."""
        self._watch.expire()
        return self._table.lend()

    def take_back(self, held: Held) -> None:
        """See ``SlotTable``."""
        self._watch.expire()
        self._table.take_back(held)

    def check_unwritten(self) -> None:
        """StreamerError if the caller has written to a bank; then all slots are empty."""
        if self._watch.written():
            self._table.clear()
            self._watch.forget()
            raise StreamerError(
                "experts' weights were written to, which other passes use: change a clone of them"
            )


def _bank(memory: torch.Tensor, view: View, slot_nbytes: int, count: int) -> torch.Tensor:
    """One tensor of all slots: (count, ...)."""
    size = view.dtype.itemsize
    strides = torch.empty(view.shape, dtype=view.dtype, device="meta").stride()
    shape, steps = (count, *view.shape), (slot_nbytes // size, *strides)
    return memory.view(view.dtype).as_strided(shape, steps, view.offset // size)
