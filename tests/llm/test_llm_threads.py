import os

import pytest
import torch
from assets import tiny_checkpoint, tiny_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.threads import leave_a_core


@pytest.fixture
def threads(monkeypatch):
    """Thread counts that torch is set to; the machine has 4 cores, torch would use 4 threads."""
    counts: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    return counts


def test_one_core_is_left_to_the_streamer(threads):
    leave_a_core()
    assert threads == [3]


def test_fewer_threads_than_that_stay_as_they_are(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    leave_a_core()
    assert threads == [2]


def test_a_single_core_still_computes(threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    leave_a_core()
    assert threads == [1]


def test_the_users_own_setting_is_kept(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    leave_a_core()
    assert threads == []


def test_an_engine_on_a_cpu_leaves_a_core(threads, tmp_path):
    path = tiny_checkpoint(tmp_path, tiny_model())
    with StreamingEngine(path, device="cpu", max_length=16):
        assert threads == [3]
