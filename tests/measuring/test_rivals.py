"""What docs/benchmarks/rivals.py says of a peer: rows, reasons, limits, weights."""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from layer_streamer.llm import StreamingEngine

BENCHMARKS = ROOT / "docs" / "benchmarks"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def asked(**changes: Any) -> Any:
    from peers.session import Asked

    given = {"checkpoint": Path("m"), "gguf": None, "work": Path(), "device": "cpu"}
    given |= {"device_nbytes": None, "prompt": 4, "tokens": 5, "turns": 2, "seconds": 60.0}
    return Asked(**given | {"threads": 1} | changes)


def row(**changes: Any) -> dict[str, Any]:
    found = {"title": "A", "status": "measured", "seconds_per_pass": 0.5, "tokens_per_second": 2.0}
    found |= {"first_token": 1.0, "device_peak": 8 << 30, "host_own": 1 << 30, "host_taken": 0}
    return (
        found | {"capped": True, "asked": {"device_nbytes": 8 << 30, "device": "cuda:0"}} | changes
    )


def bfloat16_checkpoint(folder: Path, model_type: str) -> Path:
    model = tiny_model(model_type, vocab_size=600)
    return tiny_checkpoint(folder, model.to(torch.bfloat16))


def answer(path: Path) -> list[int]:
    """Greedy ids."""
    with StreamingEngine(path, device="cpu", dtype=torch.float32) as engine:
        *_, (request, _) = engine.events([[*range(10, 30)]], max_new_tokens=6, temperature=0)
        return list(request.new_ids)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_gguf_file_made_of_a_folder_answers_as_the_folder(
    tmp_path: Path, model_type: str
) -> None:
    from peers.to_gguf import write_gguf

    folder = bfloat16_checkpoint(tmp_path, model_type)
    write_gguf(folder, tmp_path / "made.gguf")
    assert answer(tmp_path / "made.gguf") == answer(folder)


def test_losing_rows_and_reasons_stand_in_the_table_of_rivals() -> None:
    from peers.table import table

    slow = row(title="slow", seconds_per_pass=9.0)
    none = {"title": "none", "status": "skipped", "reason": "it is not installed"}
    *_, first, second, empty, reason = table([slow, none, row()]).splitlines()
    assert first.startswith("| A |") and second.startswith("| slow |")
    assert (empty, reason) == ("", "* none: skipped, it is not installed")


def test_the_page_has_every_row_of_rivals_that_is_on_record() -> None:
    from peers.table import parts, table

    lines = (BENCHMARKS / "rivals.jsonl").read_text().splitlines()
    page = (BENCHMARKS / "README.md").read_text()
    for part in parts([json.loads(line) for line in lines]).values():
        rows = [line for line in table(part).splitlines() if line.startswith("|")]
        assert "\n".join(rows) in page


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, ""),
        ({"device_peak": 9 << 30}, "over the limit"),
        ({"device_peak": 9 << 30, "capped": False}, "without the limit"),
        ({"gpu_layers": 12}, "12 layers on the GPU"),
        ({"share": 0.6}, "with 60% of the budget"),
    ],
)
def test_a_row_says_what_was_not_alike(changes: dict[str, Any], note: str) -> None:
    from peers.table import cells

    assert cells(row(**changes))[-1] == note


class Counting:
    """Gives 1, 2, 3 ...; knows what it was given."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.given: list[int] = []

    def prompt(self, ids: list[int]) -> int:
        self.prompts.append(ids)
        return 1

    def step(self, token: int) -> int:
        self.given.append(token)
        return token + 1


def test_each_turn_of_rivals_has_a_prompt_of_its_own_and_gives_on_what_came() -> None:
    from peers.session import timed

    session = Counting()
    found = timed(session, asked())
    assert session.given == [1, 2, 3, 4, 5] * 2
    assert [len(turn["steps"]) for turn in found["turns"]] == [5, 5]
    assert session.prompts[0] != session.prompts[1] and {*map(len, session.prompts)} == {4}


def test_a_peer_that_is_late_ends_its_turn_and_has_no_other() -> None:
    from peers.session import LEAST, timed

    found = timed(Counting(), asked(seconds=0.0))
    assert [len(turn["steps"]) for turn in found["turns"]] == [LEAST]


def test_a_peer_is_ended_with_all_that_it_started() -> None:
    import rivals

    waits = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
    waits += "'print(1, flush=True); input()'], stdin=subprocess.PIPE).wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", waits], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as said:
        said.readline()  # by what it started
        assert rivals.wait(process, 0.0) is None
        assert process.returncode < 0
        assert said.read() == b""  # there is nobody left to say more


def test_memory_of_a_process_and_its_children_is_seen_from_outside() -> None:
    from peers.memory import HostWatch

    holds = "import subprocess, sys\nheld = b'x' * (40 << 20)\n"
    child = f"{holds}print(1, flush=True)\ninput()"
    parent = f"{holds}subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    watch = HostWatch(process.pid)
    watch.look()
    process.communicate(b"\n")
    assert 80 * MIB < watch.own < watch.rss


def test_smaller_shares_are_tried_while_memory_of_the_device_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import rivals
    from peers.registry import PEERS

    def run_one(name: str, given: Any, args: Namespace) -> dict[str, Any]:
        failed = {"status": "failed", "reason": "OutOfMemoryError: CUDA out of memory"}
        return {"status": "measured"} if given.share < 0.8 else failed

    monkeypatch.setattr(rivals, "run_one", run_one)
    args = Namespace(checkpoint=None)
    limited = asked(device_nbytes=8 << 30)
    found = rivals.run_shares("flextensor", PEERS["flextensor"], limited, args)
    assert found == {"status": "measured", "share": 0.6}
    airllm = rivals.run_shares("airllm", PEERS["airllm"], limited, args)
    assert airllm["status"] == "failed" and airllm["share"] == 1.0


def test_names_of_rivals_are_names_or_begins_of_them() -> None:
    import rivals
    from peers.registry import PEERS

    assert rivals.chosen(["layer-streamer"]) == ["layer-streamer"]
    assert rivals.chosen(["diff", "airllm"]) == ["diffusers-leaf", "diffusers-block", "airllm"]
    assert rivals.chosen(None) == list(PEERS)
    with pytest.raises(ValueError, match="nobody"):
        rivals.chosen(["nobody"])


@given(
    base=st.integers(300 * MIB, 2048 * MIB), each=st.integers(50 * MIB, 700 * MIB),
    count=st.integers(1, 90), limit=st.integers(3, 24),
)  # fmt: skip
def test_llama_cpp_gets_the_most_layers_that_its_peak_allows(
    base: int, each: int, count: int, limit: int
) -> None:
    from peers.llama_cpp import Bench

    class Measured(Bench):
        def run(self, *options: str, repeats: int) -> dict[str, Any]:
            self.peak = base + self.layers * each
            return {}

    limited = asked(device="cuda:0", device_nbytes=limit << 30, gguf=Path("m"), llama_bench="bench")
    bench = Measured(limited)
    bench.fill([each] * count)
    most = ((limit << 30) - base) // each
    assert bench.layers == min(most, count + 1)


@pytest.mark.slow
def test_a_rival_of_our_name_is_imported_whatever_its_annotations_and_what_was_compiled(
    tmp_path: Path,
) -> None:
    package = tmp_path / "layer_streamer"
    package.mkdir()
    (package / "__init__.py").write_text("from .there import found\n")
    (package / "there.py").write_text("def found(x: [][0]) -> None: ...\n")
    compileall.compile_dir(package, quiet=1)
    code = "import sys; from peers.layers import DeferredFinder; "
    code += "sys.meta_path.insert(0, DeferredFinder()); import layer_streamer; "
    code += "print(layer_streamer.found.__annotations__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{BENCHMARKS}"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "{'x': '[][0]', 'return': 'None'}\n", done.stderr


@pytest.mark.slow
def test_rivals_are_measured_on_a_cpu_too(tmp_path: Path) -> None:
    path = bfloat16_checkpoint(tmp_path, "qwen2")
    out = tmp_path / "out.jsonl"
    command = [sys.executable, BENCHMARKS / "rivals.py", path, "--out", out, "--device", "cpu"]
    command += ["--prompt", "8", "--tokens", "4", "--threads", "1", "--peers"]
    command += ["layer-streamer", "layer-streamer-model", "layer-streamer-pass", "transformers"]
    done = subprocess.run(
        [*command, "accelerate-disk", "llama-bench", "vllm"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {found["peer"]: found for found in map(json.loads, out.read_text().splitlines())}
    assert [found["status"] for found in rows.values()] == ["measured"] * 5 + ["skipped"] * 2
    ids = [[turn["ids"] for turn in found["turns"]] for found in rows.values() if "turns" in found]
    assert all(one == ids[0] for one in ids), ids
    assert rows["transformers"]["host_own"] > rows["transformers"]["host_pss"] // 4
    assert "* vLLM, cpu_offload_gb: skipped, vllm is not installed" in done.stdout
    assert out.with_suffix(".svg").exists()
