"""The fields of a config.json, with what transformers fills in where the file leaves one out.

So that opening a model need not import transformers, which takes seconds. Tests compare the result
with transformers' own configs, of every model that the engine computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..errors import UnsupportedModelError
from .families import FAMILIES
from .families.family import check

TEXT_TYPES = {
    family.text_of: family.model_type for family in FAMILIES.values() if family.text_of is not None
}
"""Of models with other parts, the type of a text part that does not say."""
OF_THE_WHOLE = ("eos_token_id", "bos_token_id", "quantization_config", "tie_word_embeddings")
"""Fields that such a model has for its text part, too."""


def text_part(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config.json's language model: those of its ``text_config``, with ``part_of``
    for the whole model's type, where that is no type in FAMILIES."""
    text, whole = fields.get("text_config"), fields.get("model_type")
    if not isinstance(text, Mapping) or whole in FAMILIES:
        return fields
    shared = {name: fields[name] for name in OF_THE_WHOLE if fields.get(name) is not None}
    model_type = text.get("model_type") or TEXT_TYPES.get(str(whole))
    return {**text, **shared, "model_type": model_type, "part_of": str(whole)}


def config_fields(fields: Mapping[str, Any]) -> SimpleNamespace:
    """A config.json of a model in FAMILIES as transformers reads it: defaults, the kinds of layers,
    and one ``rope_parameters`` for its older spellings.

    UnsupportedModelError for a field that the engine reads and that is of another type.
    """
    family = FAMILIES[fields["model_type"]]
    aliases = family.aliases.items()
    fields = {**fields, **{name: fields[alias] for alias, name in aliases if alias in fields}}
    found = SimpleNamespace(**{**family.defaults, **fields})
    for name, default in family.defaults.items():
        if name == "eos_token_id":
            _check_ids(found.eos_token_id)
        elif name in family.nullable:
            if getattr(found, name) is not None:
                check(name, getattr(found, name), int)
        else:
            check(name, getattr(found, name), type(default))
    if found.num_attention_heads < 1:
        raise UnsupportedModelError("num_attention_heads: must be at least 1")
    if family.whole_heads and found.hidden_size % found.num_attention_heads:
        raise UnsupportedModelError(
            f"hidden_size {found.hidden_size} is not a multiple of num_attention_heads "
            f"{found.num_attention_heads}"
        )
    if family.fill_kinds is not None:
        kinds = family.fill_kinds(found)
        if getattr(found, "layer_types", None) is None:
            found.layer_types = kinds
        check("layer_types", found.layer_types, list)
    found.rope_parameters, found.rope_scaling = family.ropes(fields), None
    if family.ropes_by_kind:
        found.rope_theta = None  # of the layers that see everything, and in there
    return found


def _check_ids(ids: object) -> None:
    for item in ids if isinstance(ids, list) else [ids]:
        if ids is not None:
            check("eos_token_id", item, int)
