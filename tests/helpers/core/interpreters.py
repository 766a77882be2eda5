"""Scripts, each in an interpreter of its own: a fork of one that has imported the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paths import ROOT

HANG_SECONDS = 200
"""For one script; the kernel ends those that take longer."""

FORKS = f"""
import gc, json, os, signal, sys
from layer_streamer import LayerStreamer  # which imports torch: the package by itself does not

# At their end the forks look through what they have made, not through all of torch.
gc.collect()
gc.freeze()


def own_script():
    for number, script in enumerate(json.load(sys.stdin)):
        pid = os.fork()
        if not pid:
            signal.alarm({HANG_SECONDS})
            for stream, name in (1, "out"), (2, "err"):
                log = f"{{sys.argv[2]}}/{{number}}.{{name}}"
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), stream)
            return script
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


exec(own_script())
"""


def run_scripts(
    scripts: Sequence[str], argument: Path, logs: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Run scripts one after the other, each as the main module of an interpreter that it ends.

    Importing torch takes longer than all that they do, and is done once. ``argument`` is their
    first argument; what they print goes to files in ``logs``.
    """
    codes = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKS, str(argument), str(logs)],
        input=json.dumps(scripts), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
        # No threads at the fork: Python would warn.
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    ).stdout.split()  # fmt: skip
    return [
        subprocess.CompletedProcess(
            script, int(code), (logs / f"{i}.out").read_text(), (logs / f"{i}.err").read_text()
        )
        for i, (script, code) in enumerate(zip(scripts, codes, strict=True))
    ]
