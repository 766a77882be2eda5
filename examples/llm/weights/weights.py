"""The use of a checkpoint's weights in a pass, unpacked where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from layer_streamer import LayerSpec

from ..models.config import ModelConfig
from ..models.modules import MATRICES, SINKS, expert_module, shared_key
from ..models.names import WeightNames
from .arithmetic import FASTEST, Arithmetic
from .dequant import Unpacker
from .packed import FLOATS, Packed, take_rows
from .scale_check import ScaleCheck
from .stored import Stored


class StepWeights:
    """The tensors of one step of a pass.

    Holds views of a slot, so it lives as long as the step.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layer: LayerSpec,
        names: WeightNames,
        unpacker: Unpacker,
        check: ScaleCheck | None = None,
        arithmetic: Arithmetic = FASTEST,
    ) -> None:
        """``check`` looks at each scale once; ``arithmetic`` is what computes with the weights."""
        self._tensors, self._layer = tensors, layer
        self._store = getattr(tensors, "experts", None)
        """Brings the layer's experts, where they do not come with it."""
        self._names, self._unpacker, self._check = names, unpacker, check
        self._matrices = names.layers[layer.layer_idx]
        self._pairs = {} if names.adapter is None else names.adapter.layers[layer.layer_idx]
        self.arithmetic = arithmetic
        self.layer_idx = layer.layer_idx
        self.interleaved_rope = names.interleaved_rope

    @property
    def addresses(self) -> tuple[torch.Tensor, ...]:
        """What the step has been handed out, but for experts that come on demand."""
        return tuple(self._tensors.values())

    def norm(self, module: str) -> torch.Tensor:
        """What ``rms_norm`` multiplies by, of a norm by its name in transformers."""
        weight_D = self._tensors[f"{self._names.modules[module]}.weight"]
        return norm_weight(weight_D.to(self._unpacker.dtype), self._names)

    def sinks(self) -> torch.Tensor | None:
        """A score of each query head that attention has beside those of positions; None: the model
        has none."""
        own = self._names.modules.get(SINKS)
        if own is None:
            return None
        return self._tensors[own if own in self._tensors else f"{own}.weight"]

    def linear(self, x_TD: torch.Tensor, module: str) -> torch.Tensor:
        """x times the transposed weight of a module, plus its bias if it has one, and what an
        adapter adds: (T, rows)."""
        matrix = self._matrices[module]
        return self._project(x_TD, module, matrix.packed(self._tensors), matrix)

    def _project(
        self, x_TD: torch.Tensor, module: str, packed: Packed, matrix: Stored
    ) -> torch.Tensor:
        if self._check is not None:
            self._check.see(packed, self._layer.tensors[matrix.scale_key], matrix.number)
        bias = packed.parts.get("bias")  # of an expert
        if bias is not None:
            bias = bias.to(x_TD.dtype)
        elif module in self._names.biased:
            bias = self._tensors[f"{self._names.modules[module]}.bias"]
        y_TN = self.arithmetic.project(x_TD, packed, self._unpacker, bias)
        pair = self._pairs.get(module)
        if pair is None:
            return y_TN
        low_TR = self.arithmetic.project(x_TD, pair.down, self._unpacker)
        return self.arithmetic.add_product(y_TN, low_TR, pair.up.parts["weight"])

    def experts(self, needed: Sequence[int]) -> Iterator[int]:
        """Those of the layer's experts, ascending, one after the other once it is there. Where they
        are more than there are slots, the next come while these are computed with: in the same
        order, so that it changes no bit."""
        if self._store is None:
            yield from needed
            return
        for part, _ in self._store.rounds(needed):
            yield from part

    def expert(self, x_TD: torch.Tensor, expert: int, matrix: str) -> torch.Tensor:
        """``linear`` of a matrix of one of the layer's experts, of tokens that pass it: the one
        that ``experts`` has come to."""
        module = expert_module(expert, matrix)
        if self._store is None:
            return self.linear(x_TD, module)
        stored = self._matrices[module]
        return self._project(x_TD, module, self._in_its_slot(stored, expert), stored)

    def in_slots(self, matrix: str) -> Packed:
        """A matrix of all experts that are in slots, as of ``Stored.in_slots``. Only where experts
        are brought on demand."""
        assert self._store is not None
        key = self.layer_idx, matrix
        found: Packed | None = self._store.derived.get(key)
        if found is None:
            stored = self._matrices[expert_module(0, matrix)]
            found = self._store.derived[key] = stored.in_slots(dict(self._banks(stored)))
        return found

    @property
    def on_demand(self) -> bool:
        """True: the layer's experts come to slots when they are asked for."""
        return self._store is not None

    def slots_of(self, ids_TK: torch.Tensor) -> torch.Tensor | None:
        """The slots of experts that tokens have chosen, token by token, on the device: without a
        look at them where all are there, or where the device brings them; else brought, which waits
        for the device. None: they are more than there are slots."""
        assert self._store is not None
        slots_P: torch.Tensor | None = self._store.load_on_device(ids_TK.flatten())
        if slots_P is not None:
            return slots_P
        table = self.all_there()
        if table is not None:
            return table[ids_TK.flatten()]
        asked = ids_TK.flatten().tolist()
        where = self.bring(asked)
        if where is None:
            return None
        return _sent([where[expert] for expert in asked], ids_TK.device)

    def all_there(self) -> torch.Tensor | None:
        """The slots of all experts, on the device; None: not each has one."""
        assert self._store is not None
        table: torch.Tensor | None = self._store.all_there()
        if table is not None:
            self._see_experts(range(len(table)))
        return table

    def all_slots(self) -> torch.Tensor | None:
        """As ``all_there``, of all that are brought now; None: there are not twice as many slots,
        and while these are in use no others come."""
        table = self.all_there()
        if table is not None:
            return table
        assert self._store is not None
        every = range(len(self._store))
        if 2 * len(every) > self._store.num_slots:
            return None
        slots_X: torch.Tensor = self._store.load(every)
        self._see_experts(every)
        return slots_X

    def rounds(self, needed: Sequence[int]) -> Iterator[Mapping[int, int]]:
        """Experts, ascending, in slots, which are told: all, or as many at a time as half of the
        slots are, while the next ones come."""
        assert self._store is not None
        for part, _ in self._store.rounds(needed):
            self._see_experts(part)
            yield self._store.where

    def bring_ahead(self) -> None:
        """Have experts of the next layer brought while this one is computed."""
        assert self._store is not None
        self._store.hint_next()

    def bring_own_ahead(self) -> None:
        """Have experts of this layer brought, before it is known who is asked for."""
        assert self._store is not None
        self._store.hint(range(len(self._store)), self.layer_idx)

    def bring(self, asked: Sequence[int]) -> Mapping[int, int] | None:
        """Experts to slots, which are told; None: they are more than there are slots."""
        assert self._store is not None
        if len(set(asked)) > self._store.num_slots:
            return None
        where: Mapping[int, int] = self._store.bring(asked)
        self._see_experts(asked)
        return where

    def _see_experts(self, experts: Iterable[int]) -> None:
        """Have scales of experts that are in slots looked at, each once."""
        new = [] if self._check is None else self._check.unseen(self.layer_idx, experts)
        if not new or self._check is None:
            return
        assert self._store is not None
        where, slots_S = self._store.where, None
        for matrix in MATRICES:
            stored = [self._matrices[expert_module(expert, matrix)] for expert in new]
            if stored[0].format in FLOATS:
                continue
            specs = [self._layer.tensors[one.scale_key] for one in stored]
            bank = self.in_slots(matrix)
            if slots_S is None:
                device = bank.parts[stored[0].streamed].device
                slots_S = _sent([where[expert] for expert in new], device)
            self._check.see_slots(bank, slots_S, specs)

    def _in_its_slot(self, stored: Stored, expert: int) -> Packed:
        assert self._store is not None
        slot = self._store.where[expert]
        tensors = {key: bank[slot] for key, bank in self._banks(stored)}
        return replace(stored, expert=None).packed(tensors)

    def _banks(self, stored: Stored) -> Iterator[tuple[str, torch.Tensor]]:
        """By key, what holds a matrix's tensors for all slots."""
        assert self._store is not None
        for key in stored.keys.values():
            yield key, self._store.bank(key if stored.expert is not None else shared_key(key))


def _sent(slots: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n,) of int64, on the device, from page-locked memory: else the host waits until experts on
    their way have been copied."""
    pinned = device.type == "cuda"
    numbers = torch.tensor(slots, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return numbers.to(device, non_blocking=True)


def norm_weight(weight_D: torch.Tensor, names: WeightNames) -> torch.Tensor:
    """What ``rms_norm`` multiplies by, of the weight as it is stored: of the final norm, too."""
    return weight_D if names.norm_offset is None else weight_D.float() + names.norm_offset


def embed_tokens(
    ids_T: torch.Tensor, table: Packed, config: ModelConfig, unpacker: Unpacker
) -> torch.Tensor:
    """What the first layer gets of these tokens: (T, D), on the unpacker's device, in its dtype.

    ``ids_T`` and the embedding's ``table``, over what ``host_tensor`` gives, are on the host: only
    the rows of these tokens travel.
    """
    rows = take_rows(table, ids_T).to(unpacker.device)
    x_TD = torch.empty(len(ids_T), table.width, dtype=unpacker.dtype, device=unpacker.device)
    fill_embedding(x_TD, rows, config, unpacker)
    return x_TD


def fill_embedding(
    out_TD: torch.Tensor, rows: Packed, config: ModelConfig, unpacker: Unpacker
) -> None:
    """Write what the first layer gets of tokens whose rows of the embedding are on the device:
    perhaps in ``out_TD`` itself, if they are floats of its dtype."""
    if rows.format in FLOATS:
        out_TD.copy_(rows.parts["weight"])
    else:
        for start, end, block in unpacker.blocks(rows):
            out_TD[start:end] = block
    if config.embed_scale != 1.0:  # rounded to the dtype first, as the models were trained
        out_TD *= torch.tensor(config.embed_scale, dtype=out_TD.dtype, device="cpu")
