"""A child that is forked while a streamer opens or runs a pass: ClosedError, no hang, no zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from interpreters import run_script
from routes import NUM_LAYERS

START = """
import os, signal, sys, threading, warnings
from layer_streamer import LayerStreamer, ClosedError
warnings.simplefilter("ignore", DeprecationWarning)
options = {}

def end(child, after=lambda: None):
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        return
    try:
        after()
    except ClosedError as error:
        os._exit(7 if "process" in str(error) else 2)
    os._exit(1)
"""
IN_SWEEP = """
with LayerStreamer.from_checkpoint(sys.argv[1], device="cpu", **options) as streamer:
    for taken in (1, streamer.num_layers):
        sweep = streamer.sweep()
        for _ in range(taken):
            next(sweep)
        end(os.fork(), lambda: next(sweep))
        assert len(list(sweep)) == streamer.num_layers - taken
    streamer.run_pass(None, lambda x, w, i: x)
"""
IN_LAYER_FN = """
with LayerStreamer.from_checkpoint(sys.argv[1], device="cpu", **options) as streamer:
    forked = []
    def fork(x, weights, i):
        if i == 2:
            forked.append(os.fork())
        return x
    try:
        streamer.run_pass(None, fork)
    except ClosedError:
        assert forked == [0]
        streamer.close()
        os._exit(7)
    end(forked[0])
    streamer.run_pass(None, lambda x, w, i: x)
"""
WHILE_WAITING = """
# The thread that waits for a layer is the one that a signal has fork.
import layer_streamer.transport.files as files
held = threading.Event()
read = files.OpenFiles.read_into
def slow(self, *arguments, **options):
    if threading.current_thread().name.startswith(sys.argv[2]) and not held.is_set():
        os.kill(os.getpid(), signal.SIGUSR1)
        held.wait()
    return read(self, *arguments, **options)
files.OpenFiles.read_into = slow
forked = []
def fork(*_):
    if not forked:
        forked.append(os.fork())
    if forked[0]:
        held.set()
signal.signal(signal.SIGUSR1, fork)
try:
    with LayerStreamer.from_checkpoint(sys.argv[1], device="cpu", **options) as streamer:
        streamer.run_pass(None, lambda x, w, i: x)
except ClosedError:
    os._exit(7 if forked == [0] else 3)
end(forked[0])
"""
OPTIONS = ["{'n_gpu': 0}", "{'read_mode': 'mapped'}", "{'device_budget': '1GiB'}"]
WAITING = {
    "layer-streamer-read": "{'read_threads': 1}",
    "layer-streamer-task": "{'device_budget': '1GiB', 'read_threads': 1}",
}


def script_of(body: str, options: str) -> str:
    return START.replace("{}", options, 1) + body


SCRIPTS = [
    *(script_of(IN_SWEEP, options) for options in OPTIONS),
    script_of(IN_LAYER_FN, OPTIONS[0]),
]
SCRIPTS += [
    script_of(WHILE_WAITING, options).replace("sys.argv[2]", repr(thread))
    for thread, options in WAITING.items()
]


@pytest.mark.parametrize(
    "script",
    [
        SCRIPTS[0],
        SCRIPTS[3],
        *(pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS[1:3] + SCRIPTS[4:]),
    ],
)
def test_the_child_is_told_so_and_the_parent_goes_on(tmp_path: Path, script: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    done = run_script(script, tmp_path, strict=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
