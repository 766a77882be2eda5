"""What layer_fn gets: a mapping that torch's tools see into, and that cannot be changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from interpreters import run_script
from support import make_device, open_checkpoint
from torch.utils._pytree import keystr, tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from layer_streamer import LayerStreamer
from layer_streamer.transport.weights import Weights

UP, NORM = "mlp.up_proj.weight", "input_layernorm.weight"
Q = "self_attn.q_proj.weight"


@pytest.fixture(
    params=[
        ("cpu", {}),
        ("cpu", {"read_mode": "mapped"}),
        ("cpu", {"device_budget": "1GiB"}),
        ("cpu", {"dtype": torch.bfloat16}),
        ("fake", {"n_cpu_pinned": 1}),
    ],
    ids=["slots", "mapped", "resident", "cast", "copied"],
)
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Of layer 1, handed out in each of the ways that there are."""
    device, options = request.param
    tiny_checkpoint(tmp_path, 3)
    with open_checkpoint(make_device(device), tmp_path, **options) as streamer:
        sweep = streamer.sweep()
        next(sweep)
        yield next(sweep)[1]
        sweep.close()


def test_it_is_a_mapping_of_the_layers_tensors(weights: Any) -> None:
    assert isinstance(weights, Mapping)
    assert set(weights) == {UP, NORM, Q}
    assert {**weights} == dict(weights) == dict(weights.items())
    assert weights.get("nope") is None
    match weights:
        case {"mlp.up_proj.weight": tensor}:
            assert tensor is weights[UP]


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.__setitem__(UP, None),
        lambda w: w.__delitem__(UP),
        lambda w: w.update(a=1),
        lambda w: dict.update(w, a=1),
        lambda w: w.__ior__({}),
        lambda w: w.popitem(),
        lambda w: w.pop(UP),
        lambda w: w.clear(),
        lambda w: w.setdefault("a"),
        lambda w: setattr(w, "a", 1),
    ],
)
def test_it_cannot_be_changed_nor_what_tree_map_makes_of_it(
    weights: Any, change: Callable[[Any], Any]
) -> None:
    for one in (weights, tree_map(torch.clone, weights)):
        with pytest.raises((TypeError, AttributeError)):
            change(one)
        assert set(one) == {UP, NORM, Q}


@pytest.mark.parametrize("make", [dict, copy.copy, lambda w: w.copy(), lambda w: {**w}])
def test_a_copy_of_it_is_a_plain_dict_of_the_same_tensors(
    weights: Any, make: Callable[[Any], Any]
) -> None:
    copied = make(weights)
    assert type(copied) is dict
    assert all(copied[key] is tensor for key, tensor in weights.items())
    copied["more"] = None
    assert "more" not in weights


@pytest.mark.parametrize("make", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_deep_copy_outlives_the_slot_and_holds_nothing_else(
    weights: Any, make: Callable[[Any], Any]
) -> None:
    kept = make(weights)
    assert type(kept) is dict
    for key, tensor in weights.items():
        assert torch.equal(kept[key], tensor)
        assert kept[key].untyped_storage().nbytes() == tensor.nbytes


def test_a_pytree_sees_its_tensors(weights: Any) -> None:
    leaves, spec = tree_flatten({"layer": weights, "x": 1})
    assert len(leaves) == 4
    again = tree_unflatten(leaves, spec)["layer"]
    assert type(again) is type(weights)
    assert all(again[key] is tensor for key, tensor in weights.items())
    assert tree_map(lambda tensor: tensor.shape, weights) == {
        key: tensor.shape for key, tensor in weights.items()
    }
    assert tree_map_with_path(lambda path, _: keystr(path), weights)[UP] == f"['{UP}']"


def test_gradients_by_torch_func_come_as_such_a_mapping(weights: Any) -> None:
    def loss(given: Any) -> torch.Tensor:
        return sum(tensor.float().pow(2).sum() for tensor in given.values())

    gradients = torch.func.grad(loss)(weights)
    assert all(torch.equal(gradients[key], 2 * tensor) for key, tensor in weights.items())


class Block(torch.nn.Module):
    """Computes with parameters of the checkpoint's names."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn, self.mlp = torch.nn.Module(), torch.nn.Module(), None
        self.input_layernorm.weight = torch.nn.Parameter(torch.zeros(8))
        self.self_attn.q_proj = torch.nn.Linear(8, 8, bias=False)
        self.mlp = torch.nn.Module()
        self.mlp.up_proj = torch.nn.Linear(8, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.up_proj(self.self_attn.q_proj(x * self.input_layernorm.weight))


def test_a_module_is_called_with_it(weights: Any) -> None:
    x = torch.ones(2, 8, dtype=weights[Q].dtype)
    out = torch.func.functional_call(Block(), dict(weights), (x,), strict=True)
    assert torch.equal(out, x * weights[NORM] @ weights[Q].T @ weights[UP].T)


def test_a_compiled_layer_takes_it_whole(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 3)

    def layer_fn(x: torch.Tensor, weights: Any, layer_idx: int) -> torch.Tensor:
        return x + sum(t.sum() for t in tree_map(lambda t: 2 * t, weights).values())

    compiled = torch.compile(layer_fn, backend="eager", fullgraph=True)
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu") as streamer:
        x = torch.zeros(2)
        assert torch.equal(streamer.run_pass(x, compiled), streamer.run_pass(x, layer_fn))


def test_torchs_registry_learns_of_it_when_a_streamer_is_opened_and_not_before(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, 2)
    code = (
        "import sys, torch, layer_streamer\n"
        "from torch.utils._pytree import SUPPORTED_NODES as nodes\n"
        "before = set(nodes)\n"
        "layer_streamer.LayerStreamer, layer_streamer.LayerStreamerTuner\n"
        "assert set(nodes) == before\n"
        "for _ in range(2):\n"
        "    with layer_streamer.LayerStreamer.from_checkpoint(sys.argv[1], device='cpu'): pass\n"
        "print([node.__name__ for node in set(nodes) - before])\n"
    )
    done = run_script(code, tmp_path, strict=True)
    assert (done.stdout, done.stderr) == ("['Weights']\n", "")


def test_a_key_that_is_missing_names_those_there_are_close_ones_first(weights: Any) -> None:
    with pytest.raises(KeyError) as caught:
        weights["up_proj.weight"]
    assert caught.value.args == ("up_proj.weight",)
    text = str(caught.value)
    assert text.startswith(f"'up_proj.weight': the layer has '{UP}', ")
    assert all(repr(key) in text for key in weights) and "\n" not in text
    assert weights.get("bias") is None and "bias" not in weights
    with pytest.raises(KeyError, match="3: the layer has"):
        weights[3]


def test_of_many_keys_few_are_named() -> None:
    made = Weights({f"experts.{i}.weight": torch.zeros(1) for i in range(500)})
    with pytest.raises(KeyError) as caught:
        made["experts.77.wieght"]
    text = str(caught.value)
    assert "'experts.77.weight'" in text and text.endswith("and 492 more")
    with pytest.raises(KeyError, match="no tensors"):
        Weights({})["a"]
