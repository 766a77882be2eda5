"""The tensors outside of layers: their names, whether embedding and head are one, and the rest."""

from __future__ import annotations

from layer_streamer import Manifest

from ..errors import UnsupportedModelError
from ..weights.finder import PACKED_KEYS, Finder
from ..weights.stored import Stored, check_plain, equal_values
from ..weights.unused import refuse_unused
from .config import ModelConfig
from .gguf_names import GGUF_PARTS, GGUF_STATIC

LAYERS = "layers.{i}."
"""What the layers' prefix ends with; what comes before it is that of the embedding and the norm."""


class Outside:
    """The tensors of a model that are outside of its layers."""

    def __init__(self, manifest: Manifest, config: ModelConfig) -> None:
        self._manifest, self._config = manifest, config
        self._static = manifest.static
        self._gguf = manifest.format == "gguf"
        self._used: set[str] = set()
        self.notes: list[str] = []
        pattern = manifest.layer_pattern or f"model.{LAYERS}"
        if not self._gguf and not pattern.endswith(LAYERS):
            raise UnsupportedModelError(
                f"{manifest.path}: layers named {pattern}: the engine knows models whose layers "
                f"are named ...{LAYERS}"
            )
        self.stem = pattern.removesuffix(LAYERS)
        """Prefix of the model's tensors, the output head's not always."""

    def norm(self) -> str:
        """The tensor of the norm before the head."""
        name = f"{self._module('model.norm')}.weight"
        self._check_vector(name, self._config.hidden_size)
        return name

    def rope_factors(self) -> str | None:
        """Divisors of the rotary frequencies, which files of LLaMA models may have."""
        name, llama = "rope_freqs.weight", self._config.family.permuted_in_gguf
        if not (self._gguf and llama and name in self._static):
            return None
        self._check_vector(name, self._config.head_dim // 2)
        return name

    def embedding_and_head(self) -> tuple[Stored, Stored]:
        """Both matrices, one if they are tied: of a config that says so, a head that is stored with
        values of its own is used, and one that is alone is the embedding, too."""
        table, head = self._module("model.embed_tokens"), self._head()
        tied = self._config.tied_head or self._gguf
        if tied and not self._is_stored(head):
            matrix = self._matrix(table)
            return matrix, matrix
        if tied and not self._is_stored(table) and not self._gguf:
            matrix = self._matrix(head)
            return matrix, matrix
        matrices = self._matrix(table), self._matrix(head)
        if not tied or self._gguf:
            return matrices
        specs = [self._static[matrix.key] for matrix in matrices]
        if equal_values(*specs):
            return matrices[0], matrices[0]
        self.notes.append(
            f"the config ties the output head to the embedding, but {specs[1].name!r} is stored "
            "with other values: it is used, as transformers does"
        )
        return matrices

    def refuse_others(self) -> None:
        """UnsupportedModelError for a tensor that has no use and may have one."""
        unused = {n: spec for n, spec in self._static.items() if n not in self._used}
        parts = [name for name in unused if self._is_of_another_part(name)]
        if parts:
            names = ", ".join(sorted({name.removeprefix("model.").split(".")[0] for name in parts}))
            whole = "the file" if self._gguf else f"a {self._config.part_of} model"
            self.notes.append(
                f"the text part of {whole} is run; other parts ({names}) are not used"
            )
        unused = {name: unused[name] for name in unused.keys() - set(parts)}
        refuse_unused(unused, str(self._manifest.path), self._config.model_type)

    def _is_of_another_part(self, name: str) -> bool:
        """True for images and the like, beside a model's text part."""
        if self._gguf:
            return name.startswith(GGUF_PARTS)
        outside = self._config.part_of is not None and not name.startswith(self.stem)
        return outside and "lm_head" not in name.split(".")

    def _module(self, name: str) -> str:
        """What a module outside of layers is called here."""
        return GGUF_STATIC[name] if self._gguf else self.stem + name.removeprefix("model.")

    def _head(self) -> str:
        if self._gguf:
            return GGUF_STATIC["lm_head"]
        nested = f"{self.stem.removesuffix('model.')}lm_head"
        return nested if self._is_stored(nested) else "lm_head"

    def _is_stored(self, module: str) -> bool:
        return any(f"{module}.{kind}" in self._static for kind in ("weight", *PACKED_KEYS))

    def _check_vector(self, name: str, length: int) -> None:
        if name not in self._static:
            raise UnsupportedModelError(f"{self._manifest.path}: tensor {name!r} is missing")
        check_plain(self._static[name], (length,))
        self._used.add(name)

    def _matrix(self, module: str) -> Stored:
        """The embedding or the head."""
        config, path = self._config, str(self._manifest.path)
        last = module.rpartition(".")[2]
        names = (module, last if last == "lm_head" else f"model.{last}")
        scheme = config.quantization.scheme(*names) if config.quantization else None
        finder = Finder(self._static, path)
        found = finder.find(module, (config.vocab_size, config.hidden_size), scheme)
        self._used |= {*found.keys.values(), *finder.compared}
        if found.transposed or not found.ordered:
            spec = self._static[found.key]
            raise UnsupportedModelError(
                f"tensor {spec.name!r} is packed as {found.format}, which is supported in layers "
                f"only ({spec.path})"
            )
        return found
