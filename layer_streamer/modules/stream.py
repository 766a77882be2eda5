"""stream(): a model that keeps its class, its forward and its hooks, and whose weights stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack, overload

from torch import nn

from ..checkpoint.formats import read_tensors
from ..errors import ConfigError
from ..planning.options import Options, check_names
from .blocks import find_stacks
from .ends import choice
from .ends.choice import Embeddings, Heads
from .hub import local_folder, naming_extra
from .opening import Wishes, build_model, open_models, prepare, sequences_of
from .pipelines.index import is_pipeline
from .pipelines.pipeline import open_pipeline
from .share import reserve_of

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")
OF_LAYERS = ("layers", "tail", "layer_pattern", "on_copy", "host_layers")
"""Options of a streamer that a model's own forward has no use for."""


@overload
def stream(
    model: str | Path,
    *,
    cls: type[M],
    model_options: Mapping[str, Any] | None = ...,
    trust_remote_code: bool = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> M: ...
@overload
def stream(
    model: str | Path,
    *,
    cls: None = ...,
    model_options: Mapping[str, Any] | None = ...,
    trust_remote_code: bool = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> Any: ...
@overload
def stream(
    model: type[C],
    path: str | Path,
    *,
    model_options: Mapping[str, Any] | None = ...,
    trust_remote_code: bool = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> C: ...
@overload
def stream(
    model: M,
    path: str | Path,
    *,
    key_mapping: Mapping[str, str] | None = ...,
    stacks: Sequence[str] | None = ...,
    embeddings: Embeddings = ...,
    head: Heads = ...,
    strict: bool = ...,
    **options: Unpack[Options],
) -> M: ...
@naming_extra()
def stream(  # noqa: PLR0913 - three ways to say which model
    model: str | Path | nn.Module | type,
    path: str | Path | None = None,
    *,
    cls: Any = None,
    model_options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    stacks: Sequence[str] | None = None,
    embeddings: Embeddings = "auto",
    head: Heads = "auto",
    strict: bool = False,
    **options: Unpack[Options],
) -> Any:
    """A model whose blocks get their weights while its own forward runs.

    ``model``: a folder of transformers', or the name of a repository; the class is the one that its
    config.json names, or ``cls``, made with ``model_options`` (``attn_implementation`` and the
    like). Or the folder of one of diffusers' models, or of a pipeline, whose ``model_options`` are
    components in place of its own. Or a class, and ``path``, such a folder or name, or a file that
    diffusers converts (``model_options``: its ``config``). Or an nn.Module on meta, and ``path``, a
    safetensors folder or file (GGUF, too), of the module's names, or by ``key_mapping`` (regular
    expressions, replacements). ``stacks``: the blocks, as patterns ("blocks.{i}.") or names, if
    they are not found. ``strict``: weights used outside of their block's forward raise an error by
    name. ``embeddings``: "host" takes rows from host memory; "auto" those of 64 MiB and more if not
    all fits the budget. ``head``: "stream" streams the output head's rows; "auto" if it must.

    Returns the model, in eval mode, without gradients; ``.layer_streamer`` is its
    :class:`ModuleStreamer`, a pipeline's its :class:`PipelineStreamer`. ``options`` are those of
    :meth:`LayerStreamer.from_checkpoint`. ``device_budget`` counts weights: slots, resident blocks
    and what is outside of blocks, of all components; its default on a GPU, "auto", is what is free
    less ``reserve_bytes`` (2 GiB) for activations and caches. ``dtype``: None is the checkpoint's.
    CheckpointError for weights that do not fit; ConfigError for what cannot stream; none is open.
    """
    _check(options, ends := choice.Wishes(embeddings, head))
    asked = {"trust_remote_code": trust_remote_code, **(model_options or {})}
    wishes = Wishes(options.pop("dtype", None), asked, key_mapping, stacks, ends, strict)
    reserve = reserve_of(options.pop("reserve_bytes", None), options.get("device_budget"))
    if isinstance(model, nn.Module):
        net, manifest = model.eval().requires_grad_(False), read_tensors(_path(model, path))
    else:
        if isinstance(model, type):
            model, cls = _path(model, path), model
        folder = local_folder(model)
        if is_pipeline(folder, cls):
            return open_pipeline(cls, folder, options, wishes, reserve)
        net, manifest = build_model(folder, cls, options, wishes)
    sequences = sequences_of(find_stacks(net, stacks))
    open_models([prepare(net, manifest, sequences, options, wishes)], reserve)
    return net


def _path(model: nn.Module | type, path: str | Path | None) -> str | Path:
    if path is None:
        name = model.__name__ if isinstance(model, type) else "module"
        raise ConfigError(f"stream({name}, path): say where the checkpoint is")
    return path


def _check(options: Options, ends: choice.Wishes) -> None:
    """ConfigError, TypeError for what cannot be asked for."""
    check_names(options, Options)
    for name in OF_LAYERS:
        if options.get(name) is not None:
            raise ConfigError(f"{name}=: not with a module, whose forward has its own order")
    ends.check()
