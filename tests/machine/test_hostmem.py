"""Free host memory within cgroups: fake trees of files, and a real limit where one can be set."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from cgroups import V1, V2, real_cgroup
from checkpoints import write_raw_safetensors
from interpreters import run_script

from layer_streamer.machine import hostmem
from layer_streamer.machine.hostmem import available_host_bytes

FREE = 64 << 30
GIB = 1 << 30

Tree = Callable[..., int]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """``tree(membership, {"path/file": text})``: what is available in such a tree."""
    monkeypatch.setattr(hostmem, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(hostmem, "MEMBERSHIP", tmp_path / "membership")
    free = SimpleNamespace(available=FREE)
    monkeypatch.setattr("layer_streamer.machine.hostmem.psutil.virtual_memory", lambda: free)

    def look(membership: str | bytes, files: dict[str, object]) -> int:
        raw = membership.encode() if isinstance(membership, str) else membership
        (tmp_path / "membership").write_bytes(raw)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return available_host_bytes()

    return look


def group(folder: str, names: tuple[str, str], limit: object, usage: object) -> dict[str, object]:
    return {str(Path(folder, names[0])): limit, str(Path(folder, names[1])): usage}


def test_without_cgroups_it_is_what_the_kernel_says_is_available(tree: Tree) -> None:
    assert tree("", {}) == FREE


def test_without_a_membership_file_it_is_what_the_kernel_says(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostmem, "MEMBERSHIP", tmp_path / "missing")
    assert available_host_bytes() == FREE


@pytest.mark.parametrize("tightest", ["", "a", "a/b", "a/b/c"])
def test_the_tightest_limit_counts_wherever_it_is_above_the_process(
    tree: Tree, tightest: str
) -> None:
    files = {}
    for folder in ("", "a", "a/b", "a/b/c"):
        limit = 5 * GIB if folder == tightest else 9 * GIB
        files |= group(folder, V2, limit, GIB)
    assert tree("0::/a/b/c", files) == 4 * GIB


def test_a_sibling_and_a_child_of_the_process_cgroup_do_not_count(tree: Tree) -> None:
    files = group("a", V2, 5 * GIB, GIB) | group("b", V2, 10, 5) | group("a/child", V2, 10, 5)
    assert tree("0::/a", files) == 4 * GIB


def test_max_is_no_limit(tree: Tree) -> None:
    files = group("a", V2, "max", GIB) | group("", V2, 8 * GIB, GIB)
    assert tree("0::/a", files) == 7 * GIB


def test_a_usage_above_the_limit_leaves_nothing(tree: Tree) -> None:
    assert tree("0::/a", group("a", V2, GIB, 2 * GIB)) == 0


def test_version_1_has_its_limits_below_the_memory_controllers_folder(tree: Tree) -> None:
    files = group("memory/box", V1, 2**63 - 4096, GIB) | group("memory", V1, 6 * GIB, GIB)
    membership = "9:name=systemd:/box\n4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n"
    assert tree(membership, files) == 5 * GIB


def test_version_1_may_have_the_memory_controller_beside_others(tree: Tree) -> None:
    files = group("memory/box", V1, 6 * GIB, GIB)
    assert tree("4:cpu,memory,pids:/box", files) == 5 * GIB


def test_a_controller_whose_name_only_contains_memory_is_not_it(tree: Tree) -> None:
    assert tree("4:memory_like:/box", group("memory/box", V1, GIB, 0)) == FREE


def test_in_a_container_the_hosts_path_is_missing_and_the_root_counts(tree: Tree) -> None:
    files = group("memory", V1, 6 * GIB, GIB)
    assert tree("4:memory:/docker/0123456789abcdef", files) == 5 * GIB


def test_a_path_that_leaves_the_namespace_stays_below_the_root(tree: Tree) -> None:
    assert tree("0::/../../a", group("a", V2, 3 * GIB, GIB)) == 2 * GIB


@pytest.mark.parametrize("missing", V2)
def test_a_missing_file_is_no_limit(tree: Tree, missing: str) -> None:
    files = group("a", V2, GIB, 0)
    del files[f"a/{missing}"]
    assert tree("0::/a", files) == FREE


@pytest.mark.parametrize("text", ["", "many", "1 2", "0x10", "-"])
def test_a_limit_that_is_no_number_is_no_limit(tree: Tree, text: str) -> None:
    assert tree("0::/a", group("a", V2, text, 0)) == FREE


@pytest.mark.parametrize("line", [b"", b":", b"0:", b"nonsense", b"\xff\xfe", b"0:memory", b"::"])
def test_a_malformed_line_of_the_membership_is_passed_over(tree: Tree, line: bytes) -> None:
    files = group("a", V2, 3 * GIB, GIB)
    assert tree(line + b"\n0::/a\n" + line, files) == 2 * GIB


def test_a_cgroup_whose_name_is_not_text_is_found_all_the_same(tree: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "cgroup" / os.fsdecode(b"a\xff")
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(str(3 * GIB))
    (folder / "memory.current").write_text(str(GIB))
    assert tree(b"0::/a\xff", {}) == 2 * GIB


@pytest.mark.parametrize(
    ("membership", "folder", "names", "prefix"),
    [("0::/a", "a", V2, ""), ("4:memory:/a", "memory/a", V1, "total_")],
)
def test_the_page_cache_in_the_usage_is_to_be_had(
    tree: Tree, membership: str, folder: str, names: tuple[str, str], prefix: str
) -> None:
    stat = (
        f"anon {GIB}\n{prefix}inactive_file {2 * GIB}\n{prefix}active_file {GIB}\n"
        f"workingset_refault_file 5\n{prefix}inactive_anon {GIB}\nslab 7 8\n\nactive_file x"
    )
    files = group(folder, names, 8 * GIB, 5 * GIB) | {f"{folder}/memory.stat": stat}
    assert tree(membership, files) == 6 * GIB


def test_version_1s_own_page_cache_without_its_childrens_is_not_counted_twice(tree: Tree) -> None:
    stat = f"inactive_file {GIB}\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    files = group("memory/a", V1, 8 * GIB, 5 * GIB) | {"memory/a/memory.stat": stat}
    assert tree("4:memory:/a", files) == 4 * GIB


def test_more_page_cache_than_usage_never_gives_more_than_the_limit(tree: Tree) -> None:
    # The two files are not read at one instant.
    files = group("a", V2, 2 * GIB, GIB) | {"a/memory.stat": f"active_file {4 * GIB}"}
    assert tree("0::/a", files) == 2 * GIB


LIMIT = 1 << 30
LAYER = 24 << 20
NUM_LAYERS = 30
"""More than the limit has room for beside the interpreter and torch."""
CHILD = """
import json, sys
from pathlib import Path
Path(sys.argv[2], "cgroup.procs").write_text("0")
from layer_streamer import LayerStreamer
from layer_streamer.machine.hostmem import available_host_bytes
from layer_streamer.planning.planner import usable
import fake_device, support
device = fake_device.FakeDevice(seed=1)
device.maps_files = False
before = available_host_bytes()
with support.open_checkpoint(device, Path(sys.argv[1]), n_gpu=0, host_budget="auto") as streamer:
    for _ in range(2):
        streamer.run_pass(None, lambda x, weights, i: None)
    device.drain()
    print(json.dumps({"before": before, "usable": usable(before),
                      "host": streamer.memory.host_bytes, "tiers": streamer.plan.tiers}))
"""


def test_in_a_real_cgroup_an_auto_budget_stays_below_its_limit(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.w" for i in range(NUM_LAYERS)]
    header = {
        name: {"dtype": "U8", "shape": [LAYER], "data_offsets": [i * LAYER, (i + 1) * LAYER]}
        for i, name in enumerate(names)
    }
    path = write_raw_safetensors(tmp_path / "model.safetensors", json.dumps(header))
    # A hole: zeros that take no time to write, and memory like any other bytes.
    os.truncate(path, path.stat().st_size + NUM_LAYERS * LAYER)
    with real_cgroup(LIMIT) as folder:
        child = run_script(CHILD, tmp_path, folder)
    assert child.returncode == 0, child.stderr
    said = json.loads(child.stdout.splitlines()[-1])
    assert said["before"] <= LIMIT
    assert said["host"] <= said["usable"]
    assert {"disk", "host"} == set(said["tiers"])
