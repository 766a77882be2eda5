"""Candidates: plain forms, equal ones once, defaults that the streamer takes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tuning import GIB, all_candidates

from layer_streamer import ConfigError, LayerStreamer
from layer_streamer.planning.batches import plan_batches
from layer_streamer.planning.settings import Settings
from layer_streamer.tuner.search.space import (
    AXES,
    Bounds,
    check_axes,
    complete,
    default_axes,
    make_key,
    plain,
)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "n_gpu": st.integers(0, 4),
    "n_cpu_pinned": st.none() | st.integers(0, 4),
    "n_cpu": st.none() | st.integers(0, 4),
    "batch_gpu": st.none() | st.integers(1, 7),
    "batch_cpu_pinned": st.none() | st.integers(1, 7),
    "batch_cpu": st.none() | st.integers(1, 7),
    "read_mode": st.sampled_from(["auto", "buffered", "direct", "mapped"]),
    "read_threads": st.none() | st.integers(1, 8),
    "read_chunk": st.none() | st.sampled_from([4096, 1 << 20]),
    "device_budget": st.sampled_from([None, "auto", "1GiB", GIB]),
    "host_budget": st.sampled_from([None, "auto", "2 GiB", 2 * GIB]),
    "host_layers": st.sampled_from([None, 0, 3, "auto"]),
}
some_settings = st.fixed_dictionaries({}, optional=VALUES)


def effect(settings: dict[str, Any], unified: bool) -> tuple[Any, ...]:
    """What a streamer makes of settings: written without the tuner's rules."""
    s = Settings(**{k: 0 if k.startswith("n_") and v is None else v for k, v in settings.items()})
    if unified:
        counts = {"device": s.num_device + s.num_pinned + s.num_pageable + 1}
    else:
        counts = {"device": s.num_device + 1}
        if s.read_mode != "mapped":
            if s.num_pinned:
                counts["pinned"] = s.num_pinned + 1
            if s.num_pageable or not s.num_pinned:
                counts["host"] = s.num_pageable + 1
    batches = plan_batches(s, counts, unified=unified)
    readers = (s.asked["read_threads"], s.asked["read_chunk"])
    if s.read_mode == "mapped" and not unified:
        readers = (None, None)
    asked = (s.asked["device_budget"], s.asked["host_budget"])
    budgets = [{"1GiB": GIB, "2 GiB": 2 * GIB}.get(b, b) for b in asked]  # type: ignore[arg-type]
    named = s.read_mode == "auto" and s.names_host_pools and not unified
    there = None if unified else s.asked["host_layers"] or None
    return counts, batches, readers, s.read_mode, budgets, named, there


@hypothesis_settings(deadline=None)
@given(some_settings, st.booleans())
def test_a_plain_form_is_taken_by_the_streamer_and_has_the_same_effect(
    settings: dict[str, Any], unified: bool
) -> None:
    assert effect(plain(settings, unified=unified), unified) == effect(settings, unified)


@hypothesis_settings(deadline=None)
@given(some_settings, st.booleans())
def test_plain_twice_is_plain_and_naming_every_axis_again_changes_nothing(
    settings: dict[str, Any], unified: bool
) -> None:
    form = plain(settings, unified=unified)
    assert plain(form, unified=unified) == form
    named = complete(form, {name: () for name in settings})
    assert set(named) >= set(settings)
    assert make_key(named, unified=unified) == make_key(settings, unified=unified)
    assert effect(named, unified) == effect(settings, unified)
    assert None not in [
        named.get(pool) for pool in ("n_gpu", "n_cpu_pinned", "n_cpu") if pool in named
    ]


@hypothesis_settings(deadline=None)
@given(some_settings, some_settings, st.booleans())
def test_equal_keys_mean_equal_effects(
    one: dict[str, Any], other: dict[str, Any], unified: bool
) -> None:
    if make_key(one, unified=unified) == make_key(other, unified=unified):
        assert effect(one, unified) == effect(other, unified)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"n_gpu": 2, "batch_gpu": 3}, {"n_gpu": 2, "batch_gpu": 9}),
        ({"n_gpu": 2, "batch_gpu": 1}, {"n_gpu": 2, "batch_gpu": None}),
        ({"n_gpu": 0, "batch_gpu": 5}, {"n_gpu": 0}),
        ({"n_cpu_pinned": None}, {"n_cpu_pinned": 0}),
        ({"n_cpu_pinned": 2, "n_cpu": 0}, {"n_cpu_pinned": 2, "n_cpu": None, "batch_cpu": 4}),
        ({"n_cpu": 0}, {"n_cpu": None}),
        ({"read_mode": "mapped", "n_cpu_pinned": 2}, {"read_mode": "mapped", "read_threads": 3}),
        ({"device_budget": "1GiB"}, {"device_budget": GIB}),
        ({"read_mode": "auto"}, {}),
        ({"host_layers": 0}, {"host_layers": None}),
    ],
)
def test_equal_candidates_are_one(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert make_key(one, unified=False) == make_key(other, unified=False)


def test_none_among_the_sizes_of_a_host_pool_is_read_as_0() -> None:
    axes = {"n_cpu_pinned": [None, 0, 2], "n_cpu": [None], "read_threads": [None, 2]}
    assert check_axes(axes) == {
        "n_cpu_pinned": (0, 2), "n_cpu": (0,), "read_threads": (None, 2)
    }  # fmt: skip


def test_on_the_cpu_the_three_pools_are_one() -> None:
    one = {"n_gpu": 2, "n_cpu_pinned": 4, "n_cpu": None, "batch_cpu_pinned": 3}
    other = {"n_gpu": 6, "n_cpu_pinned": None, "n_cpu": None, "batch_gpu": 3}
    assert make_key(one, unified=True) == make_key(other, unified=True)
    assert make_key(one, unified=False) != make_key(other, unified=False)


def test_a_named_host_pool_is_not_the_same_as_one_left_to_the_streamer() -> None:
    # Naming it rules mapped files out under "auto".
    assert make_key({"n_cpu_pinned": 4}, unified=False) != make_key({}, unified=False)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("cores", [2, 64])
@pytest.mark.parametrize("device", [None, 6 * GIB])
@pytest.mark.parametrize("host", [None, 16 * GIB])
def test_the_defaults_are_some_dozens_of_candidates_that_the_streamer_takes(
    unified: bool, cores: int, device: int | None, host: int | None
) -> None:
    axes = check_axes(default_axes(Bounds(device, host), cores, unified=unified))
    found = all_candidates(axes, unified=unified)
    assert 48 <= len(found) <= 200
    assert len({make_key(settings, unified=unified) for settings in found}) == len(found)
    parameters = inspect.signature(LayerStreamer.from_checkpoint).parameters
    for settings in found:
        Settings(**settings)  # type: ignore[arg-type]
        assert set(settings) <= set(parameters)
    assert set(AXES) <= set(parameters)
    assert set(AXES) <= set(inspect.signature(LayerStreamer).parameters)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"n_gpu": [1, -1]}, "n_gpu_values: n_gpu=-1: must be from 0 to 4096"),
        ({"n_gpu": [None]}, "n_gpu_values: n_gpu=None: must be an int from 0 to 4096"),
        ({"n_cpu": ["2"]}, "n_cpu_values: n_cpu='2': must be an int from 0 to 4096"),
        ({"batch_gpu": [0]}, "batch_gpu_values: batch_gpu=0: must be from 1 to 4096"),
        ({"read_mode": ["quick"]}, "read_mode_values: read_mode='quick': must be one of"),
        ({"read_mode": "direct"}, "read_mode_values='direct': must be a list of values"),
        ({"n_cpu_pinned": 4}, "n_cpu_pinned_values=4: must be a list of values"),
        ({"n_cpu_pinned": []}, "n_cpu_pinned_values=[]: must have at least one value"),
        ({"host_budget": ["6 Gb"]}, "host_budget_values: host_budget='6 Gb': must be"),
        (
            {"n_gpu": range(400), "n_cpu": range(400)},
            "the values make 160000 combinations: must be at most 100000",
        ),
    ],
)
def test_values_that_cannot_work_are_named_with_their_bound(
    axes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_axes(axes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
