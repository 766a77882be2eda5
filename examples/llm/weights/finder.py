"""Which tensors of a checkpoint hold a matrix, and whether they are what its config says.

Only headers are read here, but for what a config says, too, and what is believed: the group of each
column, zero points of symmetric weights, and a shape that is stored as a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

import torch

from layer_streamer import TensorSpec

from ..errors import UnsupportedModelError
from .packed import FLOATS
from .quantization import Scheme
from .quants import BLOCK_TYPES
from .stored import Stored, check_plain, read_values

EXPONENT_DTYPES = (torch.float8_e8m0fnu, torch.uint8)
PACKED_KEYS = ("weight_packed", "qweight")
"""What a module has instead of a weight."""
OUT_OF_ORDER = "is out of order though config.json names no act-order: it is followed"
NO_GROUPS = -1
"""In place of each column's group, where a packer left them in their order."""


class Finder:
    """Finds matrices among the tensors of a layer, or of those outside of layers."""

    def __init__(self, tensors: Mapping[str, TensorSpec], place: str) -> None:
        """``place`` begins the errors: a layer's number, or a path."""
        self._tensors, self._place = tensors, place
        self.compared: set[str] = set()
        """Keys of tensors that repeat what is known from elsewhere: they were read, and do."""
        self.remarks: list[tuple[str, str]] = []
        """Of tensors that say other than the config and are followed: (name, what was found)."""

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def spec(self, key: str) -> TensorSpec:
        """A tensor; UnsupportedModelError if it is missing."""
        if key not in self._tensors:
            raise UnsupportedModelError(f"{self._place}: tensor {key!r} is missing")
        return self._tensors[key]

    def find(self, module: str, shape: tuple[int, int], scheme: Scheme | None) -> Stored:
        """The matrix of a module; UnsupportedModelError if it is missing or not as it should be.

        A plain matrix is taken as it is, whatever the config says; a packed one must have a scheme.
        """
        spec = self._tensors.get(f"{module}.weight")
        is_packed = any(f"{module}.{kind}" in self._tensors for kind in PACKED_KEYS)
        if spec is not None and not is_packed:
            if spec.ggml_type or spec.dtype in FLOATS.values():
                return self.plain(spec, f"{module}.weight", shape)
            if spec.dtype.itemsize > 1:
                raise self.error(spec, f"has dtype {spec.dtype}, not a plain float")
        if spec is None and not is_packed:
            spec = self.spec(f"{module}.weight")
        if scheme is None:
            raise self.error(
                self._own(module),
                "is not a plain float, but config.json's quantization_config does not say how "
                "this module is packed",
            )
        makers = {
            "ct": self._ct, "int8": self._int8, "fp8": self._fp8, "awq": self._awq,
            "gptq": self._gptq,
        }  # fmt: skip
        return makers[scheme.kind](module, shape, scheme)

    def plain(self, spec: TensorSpec, key: str, shape: tuple[int, ...]) -> Stored:
        """A matrix of floats or GGUF blocks, perhaps the last two dimensions of its tensor."""
        is_vector = shape[0] == 1 and len(spec.shape) == 1  # as a matrix of one row may be stored
        check_plain(spec, shape[1:] if is_vector else shape)
        rows, width = shape[-2:]
        if spec.ggml_type in BLOCK_TYPES:
            group = BLOCK_TYPES[spec.ggml_type].weights
            return Stored(spec.ggml_type, rows, width, {"raw": key}, "raw", group)
        kind = next(kind for kind, dtype in FLOATS.items() if dtype == spec.dtype)
        return Stored(kind, rows, width, {"weight": key}, "weight")

    def _ct(self, module: str, shape: tuple[int, int], scheme: Scheme) -> Stored:
        rows, width = shape
        pack, groups = 32 // scheme.bits, self._groups(module, width, scheme)
        keys = {
            "packed": self._tensor(module, "weight_packed", (rows, -(-width // pack))),
            "scale": self._scale(module, "weight_scale", _row_scales(rows, groups, scheme)),
        }
        words = (-(-rows // pack), groups)
        if scheme.symmetric:
            middle = (0x88888888 if scheme.bits == 4 else 0x80808080) - (1 << 32)
            self._check_no_zeros(module, {words: middle})
        else:
            keys["zero"] = self._tensor(module, "weight_zero_point", words)
        keys |= self._columns(module, "weight_g_idx", (width, groups), scheme)
        self._check_stored_shape(module, shape)
        return Stored(
            f"ct{scheme.bits}", rows, width, keys, "packed", scheme.group, 1, 0,
            self._viewed(keys["scale"], groups),
        )  # fmt: skip

    def _int8(self, module: str, shape: tuple[int, int], scheme: Scheme) -> Stored:
        rows, width = shape
        groups = self._groups(module, width, scheme)
        keys = {
            "weight": self._tensor(module, "weight", shape, (torch.int8,)),
            "scale": self._scale(module, "weight_scale", _row_scales(rows, groups, scheme)),
        }
        if scheme.symmetric:
            self._check_no_zeros(module)
        else:
            zeros = _row_scales(rows, groups, scheme)
            keys["zero"] = self._tensor(module, "weight_zero_point", zeros, (torch.int8,))
        columns = self._columns(module, "weight_g_idx", (width, groups), scheme)
        if columns:
            spec = self._tensors[columns["g_idx"]]
            raise self.error(spec, "is out of order, which is supported in packed words only")
        self._check_stored_shape(module, shape)
        return Stored(
            "int8", rows, width, keys, "weight", scheme.group, 1, 0,
            self._viewed(keys["scale"], groups),
        )  # fmt: skip

    def _fp8(self, module: str, shape: tuple[int, int], scheme: Scheme) -> Stored:
        rows, width = shape
        keys = {"weight": self._tensor(module, "weight", shape, (torch.float8_e4m3fn,))}
        inverse = f"{module}.weight_scale_inv" in self._tensors
        name = "weight_scale_inv" if inverse else "weight_scale"
        per_row, columns = scheme.group_rows, scheme.group
        scale = self._tensors.get(f"{module}.{name}")
        if scale is not None and prod(scale.shape) == 1 and columns == 0:
            per_row = 0  # configs of whole rows and of whole tensors are alike
        blocks = (-(-rows // per_row) if per_row else 1, -(-width // columns) if columns else 1)
        shapes: list[tuple[int, ...]] = [blocks]
        if columns == 0:
            shapes += [blocks[:1]] if per_row else [(1,), ()]
        keys["scale"] = self._scale(module, name, shapes, exponents=True)
        self._check_no_zeros(module)
        self._check_stored_shape(module, shape)
        return Stored("fp8", rows, width, keys, "weight", columns, per_row, 0, blocks)

    def _awq(self, module: str, shape: tuple[int, int], scheme: Scheme) -> Stored:
        rows, width = shape
        groups = self._groups(module, width, scheme)
        self._check_whole_words(module, shape, 1, 8)
        keys = {
            "packed": self._tensor(module, "qweight", (width, rows // 8)),
            "zero": self._tensor(module, "qzeros", (groups, rows // 8)),
            "scale": self._scale(module, "scales", [(groups, rows)]),
        }
        return Stored("awq4", rows, width, keys, "packed", scheme.group)

    def _gptq(self, module: str, shape: tuple[int, int], scheme: Scheme) -> Stored:
        rows, width = shape
        pack, groups = 32 // scheme.bits, self._groups(module, width, scheme)
        self._check_whole_words(module, shape, pack, pack)
        keys = {
            "packed": self._tensor(module, "qweight", (width // pack, rows)),
            "zero": self._tensor(module, "qzeros", (groups, rows // pack)),
            "scale": self._scale(module, "scales", [(groups, rows)]),
        }
        keys |= self._columns(module, "g_idx", (width, groups), scheme)
        return Stored(
            f"gptq{scheme.bits}", rows, width, keys, "packed", scheme.group,
            zero_offset=scheme.zero_offset,
        )  # fmt: skip

    def _tensor(
        self,
        module: str,
        kind: str,
        shape: tuple[int, ...] | list[tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...] = (torch.int32,),
    ) -> str:
        """The key of a part, whose shape (or one of several) and dtype are checked."""
        key = f"{module}.{kind}"
        if key not in self._tensors:
            own = self._own(module)
            raise UnsupportedModelError(
                f"{self._place}: tensor {key!r} is missing; {own.name!r} in {own.path} is packed "
                "and needs it"
            )
        spec = self._tensors[key]
        shapes = shape if isinstance(shape, list) else [shape]
        if spec.dtype not in dtypes:
            known = " or ".join(str(dtype) for dtype in dtypes)
            raise self.error(spec, f"has dtype {spec.dtype}, its config says {known}")
        if spec.shape not in shapes:
            raise self.error(
                spec, f"has shape {list(spec.shape)}, the config says {list(shapes[0])}"
            )
        return key

    def _scale(
        self, module: str, kind: str, shapes: list[tuple[int, ...]], *, exponents: bool = False
    ) -> str:
        dtypes = (*FLOATS.values(), *(EXPONENT_DTYPES if exponents else ()))
        return self._tensor(module, kind, shapes, dtypes)

    def _viewed(self, key: str, groups: int) -> tuple[int, int]:
        """How a scale is viewed that may be of one row for all."""
        return prod(self._tensors[key].shape) // groups, groups

    def _groups(self, module: str, width: int, scheme: Scheme) -> int:
        """Groups of a row; an error if they do not divide it."""
        if not scheme.group:
            return 1
        if width % scheme.group:
            raise self.error(
                self._own(module),
                f"has a group_size of {scheme.group}, which does not divide {width} columns",
            )
        return width // scheme.group

    def _columns(
        self, module: str, kind: str, shape: tuple[int, int], scheme: Scheme
    ) -> dict[str, str]:
        """The part with the group of each of (columns, groups), each of which is checked; empty if
        they are in order, whatever the config says."""
        width, groups = shape
        key = f"{module}.{kind}"
        if scheme.ordered and key not in self._tensors:
            return {}
        spec = self._tensors[self._tensor(module, kind, (width,))]
        found = read_values(spec)
        in_order = torch.arange(width, device="cpu") // (width // groups)
        if torch.equal(found.long(), in_order) or bool((found == NO_GROUPS).all()):
            self.compared.add(key)
            return {}
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= groups:
            raise self.error(spec, f"has values from {low} to {high}, there are {groups} groups")
        if scheme.ordered:
            self.remarks.append((spec.name, OUT_OF_ORDER))
        return {"g_idx": key}

    def _check_no_zeros(
        self, module: str, packed: Mapping[tuple[int, ...], int] = MappingProxyType({})
    ) -> None:
        """An error if zero points are stored, and are other than those of symmetric weights: 0, or
        of a shape in ``packed`` words of this value."""
        key = f"{module}.weight_zero_point"
        spec = self._tensors.get(key)
        if spec is None:
            return
        expected = packed.get(spec.shape, 0) if spec.dtype == torch.int32 else 0
        found = read_values(spec)
        found = found.float() if found.dtype.is_floating_point else found
        if bool((found != expected).any()):
            raise self.error(spec, "is not of symmetric weights, which the config says they are")
        self.compared.add(key)

    def _check_stored_shape(self, module: str, shape: tuple[int, int]) -> None:
        spec = self._tensors.get(f"{module}.weight_shape")
        if spec is None or spec.dtype not in (torch.int64, torch.int32):
            return
        found = read_values(spec).tolist()
        if tuple(found) != shape:
            raise self.error(spec, f"says {found}, the config says {list(shape)}")
        self.compared.add(f"{module}.weight_shape")

    def _check_whole_words(
        self, module: str, shape: tuple[int, int], columns: int, rows: int
    ) -> None:
        if shape[0] % rows or shape[1] % columns:
            spec = self._tensors[f"{module}.qweight"]
            raise self.error(spec, f"cannot hold {list(shape)} numbers in whole words")

    def _own(self, module: str) -> TensorSpec:
        """The tensor with a module's weights."""
        keys = (f"{module}.{kind}" for kind in (*PACKED_KEYS, "weight"))
        return next(self._tensors[key] for key in keys if key in self._tensors)

    def error(self, spec: TensorSpec, reason: str) -> UnsupportedModelError:
        """That a tensor is not as it should be."""
        return UnsupportedModelError(f"tensor {spec.name!r} {reason} ({spec.path})")


def _row_scales(rows: int, groups: int, scheme: Scheme) -> list[tuple[int, ...]]:
    """Shapes that scales of rows may have."""
    if scheme.group_rows == 0:
        return [(1,), (), (1, 1)]
    return [(rows, groups), (rows,)] if groups == 1 else [(rows, groups)]
