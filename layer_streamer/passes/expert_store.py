"""The experts of mixtures: those that a pass asks for are brought to slots on the device.

Everything here runs on the thread that runs the pass. Copies go by a stream of their own, which is
behind all use of a slot that has been given up: a load gives up what the load before it brought.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property

import torch

from ..checkpoint.experts import ExpertLayer
from ..devices.device import Device
from ..errors import ConfigError, StreamerError
from ..experts.policies import Key
from ..experts.slots import Placing
from .expert_copies import ExpertCopies
from .expert_home import Home, Wanted
from .expert_lead import DeviceLead, open_lead
from .expert_pool import ExpertPool
from .expert_report import ExpertReport, more_needed
from .expert_tables import ExpertTables


class ExpertStore:
    """Experts of all layers, in pools of slots.

    Ownership: the thread that runs the pass; an interrupt or an error leaves at worst empty slots.
    """

    def __init__(
        self,
        layers: Mapping[int, ExpertLayer],
        pools: Mapping[int, ExpertPool],
        home: Home,
        device: Device,
    ) -> None:
        """``pools``: by layer; layers whose experts are alike share one."""
        self.layers, self.pools = layers, pools
        self._each_pool = tuple(set(pools.values()))
        self._home, self._device = home, device
        self.copies = ExpertCopies(device)
        self._in_use: tuple[ExpertPool, tuple[int, ...]] | None = None
        """The slots that a load has handed out, until they are given up."""
        self._coming: tuple[ExpertPool, list[Key]] | None = None
        """What is on its way, until that has been waited for."""
        self._ahead: tuple[ExpertPool, list[Key], Placing] | None = None
        """What the next load asks for, and has been brought for it."""
        self._hinted = set[Key]()
        self._tables = ExpertTables(
            layers, pools, lambda i, experts: self._arrange(i, self._keys(i, experts))[0]
        )
        self._report = ExpertReport()
        self._last_pass: ExpertReport | DeviceLead = self._report
        self._lead: DeviceLead | None = None

    @property
    def last_pass(self) -> ExpertReport:
        """What became of experts in the last pass that has ended; waits for one that the device
        led. Any thread."""
        last = self._last_pass
        return last.report() if isinstance(last, DeviceLead) else last

    @property
    def device_nbytes(self) -> int:
        """Of all slots."""
        return sum(pool.slab.nbytes for pool in self._each_pool)

    def begin(self) -> None:
        """A pass begins."""
        self._report = ExpertReport()
        self.give_up()

    def finish(self) -> None:
        """A pass has ended."""
        self._last_pass = self._report

    @cached_property
    def lead(self) -> DeviceLead | None:
        """What has the device bring experts by itself; None where it cannot."""
        self._lead = open_lead(self.pools, self.layers, self._home, self._device)
        return self._lead

    def load_on_device(self, layer_idx: int, ids_P: torch.Tensor) -> torch.Tensor | None:
        """Slots of experts whose numbers only the device knows; None: outside of a pass
        that it leads."""
        lead = self._lead
        return lead.load(layer_idx, ids_P) if lead is not None and lead.in_pass else None

    @contextmanager
    def led_by_device(self) -> Iterator[None]:
        """A pass in which the device brings experts by itself. StreamerError as of ``give_up``."""
        lead = self.lead
        assert lead is not None, "who asks for that has looked"
        if not lead.leads:
            self._settle_hints()
            self.give_up()
            self._ahead = None
            self._hinted.clear()
            self.copies.order_after_copies(self._device.current_stream())
            lead.take()
        lead.begin()
        try:
            yield
        finally:
            lead.end()
        try:
            for pool in self._each_pool:
                pool.check_unwritten()
        except StreamerError:
            lead.give_back(spoilt=True)
            raise
        self._last_pass = lead

    def give_up(self) -> None:
        """What was loaded may be overwritten once the work that has been enqueued is done.

        StreamerError if the caller has written to it.
        """
        if self._in_use is None:
            return
        self.copies.give_up()
        self._in_use = None
        for pool in self._each_pool:
            pool.check_unwritten()

    def load(self, layer_idx: int, experts: Sequence[int]) -> tuple[int, ...]:
        """Slots of experts that differ, which the current stream waits for.

        They are there until the next load, or the end of the hand-out. Raises ConfigError for more
        than there are slots, what reads raise, naming layer and expert.
        """
        layer, keys = self.layers[layer_idx], self._keys(layer_idx, experts)
        placing, early = self._arrange(layer_idx, keys)
        missed, used = len(placing.missing), self._hinted.intersection(keys)
        self._hinted -= used
        found = self._report
        self._report = replace(
            found,
            asked=found.asked + len(keys),
            hits=found.hits + len(keys) - missed - early,
            copied_bytes=found.copied_bytes + missed * layer.expert_nbytes,
            needed=more_needed(found.needed, layer_idx, experts),
            hints_used=found.hints_used + len(used),
        )
        return placing.slots

    @property
    def all_filled(self) -> bool:
        """True: ``all_there`` has brought every layer's, and none has left its slot since."""
        return self._tables.filled

    def all_there(self, layer_idx: int) -> tuple[torch.Tensor, tuple[int, ...]] | None:
        """The slots of all experts of a layer, brought if need be, on the device and as numbers;
        the tensor stays where it is. None: some have to share theirs. Raises what reads raise."""
        if not self._tables.all_fit:
            return None
        found = self._tables.find(layer_idx)
        if found is not None:
            self._in_use = self.pools[layer_idx], ()  # who writes to it is found out
            return found
        table, slots, brought = self._tables.make(layer_idx)
        nbytes = brought * self.layers[layer_idx].expert_nbytes
        self._report = replace(self._report, copied_bytes=self._report.copied_bytes + nbytes)
        return table, slots

    def bring_ahead(self, layer_idx: int, experts: Sequence[int]) -> None:
        """Bring what the next load asks for, in this order, while what was loaded is in use: to
        other slots, of which there are enough. Nothing waits for it but that load."""
        layer, pool = self.layers[layer_idx], self.pools[layer_idx]
        _, busy = self._in_use or (pool, ())
        keys = self._keys(layer_idx, experts)
        self._settle_hints()
        placing = pool.place(keys, busy, asked=False)
        self._fill(pool, keys, placing)
        self._ahead = pool, keys, placing
        copied = self._report.copied_bytes + len(placing.missing) * layer.expert_nbytes
        self._report = replace(self._report, copied_bytes=copied)

    def hint(self, layer_idx: int, experts: Sequence[int]) -> int:
        """Bring experts that may be asked for soon, as far as there is room beside what is in use;
        how many are on their way. Nothing waits for them but the next load."""
        layer, pool = self.layers[layer_idx], self.pools[layer_idx]
        in_use = [self._in_use, self._ahead and (self._ahead[0], self._ahead[2].slots)]
        busy = {slot for some in in_use if some and some[0] is pool for slot in some[1]}
        self._settle_hints()
        keys = self._keys(layer_idx, experts)
        there = pool.there(keys)
        busy.update(there.values())
        keys = [key for key in keys if key not in there]
        keys = keys[: (len(pool) - len(busy)) // 2]  # the rest may hold what is wanted as well
        if not keys:
            return 0
        self._fill(pool, keys, pool.place(keys, busy, asked=False))
        self._hinted.update(keys)
        found = self._report
        self._report = replace(
            found,
            hinted=found.hinted + len(keys),
            copied_bytes=found.copied_bytes + len(keys) * layer.expert_nbytes,
        )
        return len(keys)

    def _arrange(self, layer_idx: int, keys: list[Key]) -> tuple[Placing, int]:
        """Give up what was loaded before, and have experts in slots that are not given to others
        meanwhile; the current stream waits for copies. How many had been brought ahead, too."""
        pool = self.pools[layer_idx]
        self._settle_hints()
        self.give_up()
        current = self._device.current_stream()
        self.copies.avoid(current)
        placing, early = self._place(layer_idx, keys)
        self._in_use = pool, placing.slots
        self._fill(pool, keys, placing)
        self._arrive()
        self.copies.order_after_copies(current)
        return placing, early

    def _place(self, layer_idx: int, keys: list[Key]) -> tuple[Placing, int]:
        """Where a load's experts are to be, and how many of them were brought ahead for it."""
        pool, ahead, self._ahead = self.pools[layer_idx], self._ahead, None
        mine = ahead is not None and ahead[1] == keys and len(pool.there(keys)) == len(keys)
        try:
            return pool.place(keys), len(ahead[2].missing) if ahead is not None and mine else 0
        except ConfigError as error:
            raise ConfigError(f"layer {layer_idx}: {error}: load them in parts") from None

    def _keys(self, layer_idx: int, experts: Sequence[int]) -> list[Key]:
        """ConfigError for an expert that the layer does not have."""
        count = self.layers[layer_idx].num_experts
        for expert in experts:
            if not 0 <= expert < count:
                raise ConfigError(
                    f"layer {layer_idx}: expert {expert}: must be from 0 to {count - 1}"
                )
        return [(layer_idx, expert) for expert in experts]

    def _fill(self, pool: ExpertPool, keys: Sequence[Key], placing: Placing) -> None:
        """Begin to bring what is missing; what is raised leaves nothing placed."""
        missing = [keys[i] for i in placing.missing]
        offsets = [placing.slots[i] * pool.slot_nbytes for i in placing.missing]
        if missing:
            wanted = [Wanted(*key, at) for key, at in zip(missing, offsets, strict=True)]
            self._hinted.difference_update(missing)
            self._coming = pool, missing
            try:
                self._home.bring(wanted, pool.slab, self.copies.stream)
            except Exception:
                pool.failed(missing)
                raise
        pool.filled()

    def _arrive(self) -> None:
        """What is on its way has been read, and its copies are enqueued. Raises what reads raise,
        with nothing of it placed."""
        if self._coming is None:
            return
        pool, missing = self._coming
        try:
            self._home.wait()
        except Exception:
            pool.failed(missing)
            self._coming = None
            raise
        self.copies.brought()
        self._coming = None

    def _settle_hints(self) -> None:
        """Have the slots, and wait for what was hinted at. Of an expert that could not be read the
        error is raised when it is asked for, and read again."""
        if self._lead is not None:
            self._lead.give_back()
        with suppress(StreamerError):
            self._arrive()

    def close(self) -> None:
        """Wait for copies, and give page locks back. Idempotent."""
        self.wait_copied()
        for owner in self._home.owners:
            owner.close()

    def wait_copied(self) -> None:
        """Block until nothing copies from the host's memory any more."""
        self.copies.wait_copied()

    @property
    def nbytes(self) -> int:
        """Of host memory that experts are copied from."""
        return sum(int(owner.nbytes) for owner in self._home.owners)

    @property
    def pinned(self) -> bool:
        """It is page-locked."""
        return all(owner.pinned for owner in self._home.owners)
