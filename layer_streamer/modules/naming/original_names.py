"""Checkpoints of diffusion models in the layout that their makers publish: single files.

diffusers has a function for each of its classes that makes its own names and tensors of those. Here
it runs on tensors without memory, so what it does to values is known, and nothing is copied.
diffusers is imported when such a checkpoint is met, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...checkpoint.manifest import TensorSpec
from ...errors import CheckpointError
from .places import Place
from .recipe import Recipe
from .trace import Trace, piece_of


def rename_original(
    model: Any, places: Mapping[str, Place], specs: Mapping[str, TensorSpec]
) -> dict[str, Recipe] | None:
    """What diffusers makes of a published checkpoint: by name of a parameter, where its bytes lie.

    None where that is not asked for: the module is none of diffusers', its names are the
    checkpoint's, or diffusers knows no other layout of it. CheckpointError for a parameter that is
    made by arithmetic, or of tensors that are packed in different ways.
    """
    if specs.keys() >= places.keys() or not type(model).__module__.startswith("diffusers."):
        return None
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    layouts: Any = SINGLE_FILE_LOADABLE_CLASSES
    names = [base.__name__ for base in type(model).__mro__ if base.__name__ in layouts]
    if not names:
        return None
    convert = layouts[names[0]]["checkpoint_mapping_fn"]
    trace, sources = Trace(), [*specs.values()]
    tensors = {spec.name: trace.source(spec.dtype, spec.shape) for spec in sources}
    try:
        with trace:
            made = convert(config=dict(model.config), checkpoint=tensors)
    except Exception as error:
        if not places.keys().isdisjoint(specs):
            return None  # its own names, of which some are not there
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{sources[0].path}: names are not those of {type(model).__name__}, and diffusers's "
            f"{convert.__name__} cannot take it: {reason}"
        ) from error
    return {name: _recipe(name, tensor, trace, sources) for name, tensor in made.items()}


def _recipe(name: str, tensor: Any, trace: Trace, sources: Sequence[TensorSpec]) -> Recipe:
    runs = trace.runs(tensor)
    where = sources[0].path
    if not runs:
        raise CheckpointError(
            f"{where}: diffusers makes {name!r} of what is stored by arithmetic, which is not "
            "streamed: save the model by save_pretrained, and name that folder"
        )
    pieces = tuple(piece_of(sources[run.source], run) for run in runs)
    kinds = {piece.ggml_type for piece in pieces}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{where}: {name!r} is made of tensors that are packed in different ways: "
            f"{', '.join(sorted(str(kind) for kind in kinds))}"
        )
    return Recipe(name, pieces, tensor.dtype, tuple(tensor.shape))
