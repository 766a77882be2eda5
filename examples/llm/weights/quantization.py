"""How a checkpoint's config says that its matrices are packed.

Reads the ``quantization_config`` of config.json in the dialects of compressed-tensors, AWQ, GPTQ
and FP8, and refuses by name what would not be computed as it was meant. Which matrices are packed
at all, the tensors themselves say (``stored``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UnsupportedModelError

METHODS = ("compressed-tensors", "awq", "gptq", "fp8", "fbgemm_fp8", "mxfp4")
CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
SPEC_CLASSES = {"embed_tokens": "Embedding"}
"""Classes by which compressed-tensors may mean modules; all others here are "Linear"."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the numbers of a matrix are packed."""

    kind: str
    """"ct", "int8", "fp8", "awq" or "gptq"."""
    bits: int
    group: int = 0
    """Columns that share a scale; 0: all of a row."""
    group_rows: int = 1
    """Rows that share a scale; 0: all."""
    symmetric: bool = True
    ordered: bool = True
    """False: columns may belong to groups in any order."""
    zero_offset: int = 0
    """What stored zero points lack."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Some modules, and how they are packed."""

    expression: re.Pattern[str]
    """Of the beginnings of their names."""
    scheme: Scheme | None
    """None: they are not packed."""
    kind: str = ""
    """A class of modules that are meant, too."""


def _in_skip_list(name: str) -> _Rule:
    """Modules that an entry of a skip list leaves as they are, by the rule of transformers: an
    expression that matches up to the end of a part of the name, or the end of the name itself."""
    whole_parts = rf"(?:{name})(?:(?<=\.)|(?=\.|\Z))"
    return _Rule(re.compile(rf"{whole_parts}|.*{re.escape(name)}\Z"), None)


def _in_ct_list(name: str, scheme: Scheme | None) -> _Rule:
    """Modules that an entry of a compressed-tensors config means: "re:" and an expression, or a
    whole name, or a class."""
    if name.startswith("re:"):
        return _Rule(re.compile(name.removeprefix("re:")), scheme)
    return _Rule(re.compile(rf"{re.escape(name)}\Z"), scheme, kind=name)


_EVERY = re.compile("")


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a config says of each module."""

    method: str
    rules: tuple[_Rule, ...]

    def scheme(self, *names: str) -> Scheme | None:
        """Of a module by its full name, or by several that it goes by; None: it is not packed."""
        kinds = {SPEC_CLASSES.get(name.rpartition(".")[2], "Linear") for name in names}
        for rule in self.rules:  # hundreds, of thousands of modules, in FP8 mixtures of experts
            if rule.kind in kinds or any(map(rule.expression.match, names)):
                return rule.scheme
        return None


def read_quantization(config: object) -> Quantization | None:
    """Of config.json's ``quantization_config``; UnsupportedModelError for what is not supported."""
    if not config:
        return None
    if not isinstance(config, Mapping):
        raise UnsupportedModelError(f"quantization_config is {config!r}, not an object")
    method = str(config.get("quant_method"))
    if method not in METHODS:
        raise _refusal("quant_method", method, METHODS)
    rules = {"compressed-tensors": _ct_rules, "awq": _awq_rules, "gptq": _gptq_rules}
    rules["mxfp4"] = _mxfp4_rules
    try:
        found = tuple(rules.get(method, _fp8_rules)(config))
    except (AttributeError, TypeError, re.error) as error:
        raise UnsupportedModelError(f"quantization_config of {method}: {error}") from error
    return Quantization(method, found)


def _refusal(field: str, found: object, known: Iterable[object]) -> UnsupportedModelError:
    names = ", ".join(str(name) for name in known)
    return UnsupportedModelError(f"quantization: {field} {found!r} is not supported (only {names})")


def _group(config: Mapping[str, Any], default: int = 128) -> int:
    """Columns a group: -1 and null mean whole rows, which are 0 here."""
    size = config.get("group_size", config.get("q_group_size", default))
    if size is None or size == -1:
        return 0
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise _refusal("group_size", size, ("a count", "-1"))
    return size


def _skipped(config: Mapping[str, Any], *fields: str) -> Iterator[_Rule]:
    """Rules of the first of these skip lists that is there."""
    found = [config[field] for field in fields if config.get(field) is not None]
    listed = found[0] if found else []
    if not isinstance(listed, list | tuple):
        raise UnsupportedModelError(f"quantization: {fields[0]} is {listed!r}, not a list")
    for name in listed:
        yield _in_skip_list(str(name))


def _awq_rules(config: Mapping[str, Any]) -> Iterator[_Rule]:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise _refusal("AWQ version", version, ("gemm",))
    if config.get("backend") == "llm-awq":  # whose words are in another order
        raise _refusal("AWQ backend", "llm-awq", ("autoawq",))
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise _refusal("AWQ bits", bits, (4,))
    if not config.get("zero_point", True):
        raise _refusal("AWQ zero_point", False, (True,))
    yield from _skipped(config, "modules_to_not_convert")
    yield _Rule(_EVERY, Scheme("awq", 4, _group(config), symmetric=False))


GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What each says that stored zero points lack."""


def _gptq_rules(config: Mapping[str, Any]) -> Iterator[_Rule]:
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(kind, str) or kind.lower() not in GPTQ_FORMATS:
        raise _refusal("GPTQ checkpoint_format", kind, GPTQ_FORMATS)
    base = Scheme(
        "gptq",
        _gptq_bits(config.get("bits")),
        _group(config),
        symmetric=False,  # zero points are stored in any case
        ordered=not config.get("desc_act", False),
        zero_offset=GPTQ_FORMATS[kind.lower()],
    )
    yield from _skipped(config, "modules_to_not_convert")
    for pattern, changes in (config.get("dynamic") or {}).items():
        sign = pattern[:2]
        expression = re.compile(pattern[2:] if sign in ("-:", "+:") else pattern)
        if sign == "-:":
            yield _Rule(expression, None)
            continue
        yield _Rule(
            expression,
            replace(
                base,
                bits=_gptq_bits(changes.get("bits", base.bits)),
                group=_group(changes, base.group or -1),
                ordered=not changes.get("desc_act", not base.ordered),
            ),
        )
    yield _Rule(_EVERY, base)


def _gptq_bits(bits: object) -> int:
    if bits not in (4, 8):
        raise _refusal("GPTQ bits", bits, (4, 8))
    return int(str(bits))


def _mxfp4_rules(config: Mapping[str, Any]) -> Iterator[_Rule]:
    """Of gpt-oss, whose experts' tensors say by their names what they are; no other is packed."""
    yield _Rule(_EVERY, None)


def _fp8_rules(config: Mapping[str, Any]) -> Iterator[_Rule]:
    kind = config.get("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _refusal("FP8 fmt", kind, ("e4m3",))
    yield from _skipped(config, "modules_to_not_convert", "ignored_layers")
    block = config.get("weight_block_size")
    rows, columns = (1, 0) if block is None else _block(block)
    yield _Rule(_EVERY, Scheme("fp8", 8, columns, rows))


def _block(block: object) -> tuple[int, int]:
    if isinstance(block, list | tuple) and len(block) == 2:
        rows, columns = block
        if all(isinstance(n, int) and n > 0 for n in (rows, columns)):
            return rows, columns
    raise _refusal("block size", block, ("two counts",))


def _ct_rules(config: Mapping[str, Any]) -> Iterator[_Rule]:
    if (config.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedModelError("quantization: transform_config is not supported")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refusal("sparsity_config: format", sparsity, ("dense",))
    rules = []
    for name, group in (config.get("config_groups") or {}).items():
        scheme = _ct_scheme(name, group, group.get("format") or config.get("format"))
        rules += [(str(target), scheme) for target in group.get("targets") or ()]
    for name in config.get("ignore") or ():
        yield _in_ct_list(str(name), None)
    for target, scheme in sorted(rules, key=lambda rule: _ct_rank(rule[0])):
        yield _in_ct_list(target, scheme)


def _ct_rank(target: str) -> tuple[int, str]:
    """Names go before expressions, those before classes; among them the alphabet decides."""
    classes = ("Linear", *SPEC_CLASSES.values())
    return 2 if target in classes else 1 if target.startswith("re:") else 0, target


def _ct_scheme(name: str, group: Mapping[str, Any], kind: object) -> Scheme | None:
    """One of the config's groups."""
    weights = group.get("weights")
    if weights is None:
        return None
    if kind not in CT_FORMATS:
        raise _refusal(f"{name}: format", kind, CT_FORMATS)
    number, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    symmetric = bool(weights.get("symmetric", True))
    sizes = _ct_group(name, weights)
    if number == "float":
        if bits != 8 or not symmetric or kind == "pack-quantized":
            raise _refusal(f"{name}: {kind} float of bits", bits, ("symmetric 8",))
        return Scheme("fp8", 8, *sizes)
    if number != "int":
        raise _refusal(f"{name}: type", number, ("int", "float"))
    known = (4, 8) if kind == "pack-quantized" else (8,)
    if bits not in known:
        raise _refusal(f"{name}: {kind} num_bits", bits, known)
    if sizes[1] > 1:
        raise _refusal(f"{name}: strategy of whole numbers", "block", ("group", "channel"))
    if sizes[1] == 0 and not symmetric:
        raise _refusal(f"{name}: asymmetric strategy", "tensor", ("group", "channel"))
    packed = kind == "pack-quantized"
    ordered = weights.get("actorder") in (None, False, "weight", "static")
    return Scheme("ct" if packed else "int8", bits, *sizes, symmetric=symmetric, ordered=ordered)


def _ct_group(name: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    """(columns, rows) that share a scale."""
    strategy = weights.get("strategy")
    if strategy is None:  # as the package itself derives it
        strategy = "tensor" if weights.get("group_size") is None else "group"
    if strategy == "group":
        columns = _group(weights, -1)
        return columns, 1
    if strategy == "block":
        rows, columns = _block(weights.get("block_structure"))
        return columns, rows
    sizes = {"channel": (0, 1), "tensor": (0, 0)}
    if strategy not in sizes:
        raise _refusal(f"{name}: strategy", strategy, ("group", "channel", "tensor", "block"))
    return sizes[strategy]
