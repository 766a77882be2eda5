"""Whether scales are finite: looked at once each, at their first use, and judged after the pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from layer_streamer import TensorSpec

from ..errors import UnsupportedModelError
from .packed import Packed, scales, scales_in_slots

EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""Of each dtype, its bits as a whole number, and those that are all set in no finite number."""


class ScaleCheck:
    """Remembers which scales it has seen, and which of them were not finite.

    Scales are read when they are used, for reading all of them at opening would read a large part
    of the checkpoint. One flag a matrix stays on the device until :meth:`end`, so that looking
    costs no wait.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, int, int | None]] = set()
        self._found: list[tuple[Sequence[TensorSpec], torch.Tensor]] = []
        self._experts: dict[int, set[int]] = {}
        """By layer, those whose matrices have been seen in slots."""

    def unseen(self, layer_idx: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's experts that have not been asked for here before, ascending."""
        seen = self._experts.setdefault(layer_idx, set())
        new = sorted(set(experts) - seen)
        seen.update(new)
        return new

    def see_slots(self, bank: Packed, slots_S: torch.Tensor, specs: Sequence[TensorSpec]) -> None:
        """Look at the scales of matrices that lie in slots (int64, on the device), of which the
        tensors are these."""
        for scale in scales_in_slots(bank):
            own = scale.index_select(0, slots_S).flatten(1)
            self._found.append((specs, not_finite(own, each=True)))

    def see(self, packed: Packed, spec: TensorSpec, number: int | None = None) -> None:
        """Look at the scales of a matrix, or of a piece of one, unless they have been seen;
        ``number``: which of the tensor's matrices it is, if it has several."""
        key = (spec.name, packed.first_row, number)
        if key in self._seen:
            return
        self._seen.add(key)
        for scale in scales(packed):
            self._found.append(([spec], not_finite(scale)[None]))

    def end(self) -> None:
        """UnsupportedModelError, with tensor and file, if a scale was infinite or not a number."""
        found, self._found = self._found, []
        if not found:
            return
        bad = torch.cat([flags for _, flags in found]).tolist()
        seen = chain.from_iterable(specs for specs, _ in found)
        for spec, flag in zip(seen, bad, strict=True):
            if flag:
                self._seen.clear()
                self._experts.clear()
                raise UnsupportedModelError(
                    f"tensor {spec.name!r} has scales that are not finite ({spec.path})"
                )


def not_finite(scale: torch.Tensor, *, each: bool = False) -> torch.Tensor:
    """One truth, or one for ``each`` row, on the scale's device; by its bits, for ``isfinite``
    takes five times as long."""
    bits, most = scale, 255  # a power of two: see ``Packed``
    if scale.dtype != torch.uint8:
        whole, most = EXPONENTS[scale.dtype]
        bits = scale.view(whole).bitwise_and(most)
    return (bits.amax(1) if each else bits.amax()) == most
