"""The compiled form of the products: when it is made, where it is kept, and what is without it."""

import ctypes
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

import packed_cases as cases
import pytest
import torch

from layer_streamer.llm.host_kernels import build, library, products
from layer_streamer.llm.weights.arithmetic import project
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.llm.weights.packed import unpack_rows

WARNING = "plain torch computes on the processor, which takes longer: "


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    """A cache of its own; what is loaded afterwards is what was before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    loaded = library.library
    monkeypatch.setattr(library, "library", fresh := cache(loaded.__wrapped__))
    monkeypatch.setattr(products, "library", fresh)
    return fresh


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """One that writes a line, and counts how often it is asked for its version and to compile."""
    log = tmp_path / "log"
    path = script(
        tmp_path / "cc", f'echo "$@" >> {log}\ncase "$*" in *--version) exit;; esac\n'
        'while [ "$1" != -o ]; do shift; done\necho compiled > "$2"',
    )  # fmt: skip
    monkeypatch.setenv("CXX", str(path))
    return log


def compiled(log: Path) -> int:
    return sum("--version" not in line for line in log.read_text().splitlines())


def kept() -> list[Path]:
    return sorted((Path(os.environ["XDG_CACHE_HOME"]) / "layer-streamer" / build.FOLDER).iterdir())


def test_it_is_compiled_once_and_kept_whole(compiler):
    first = build.built()
    assert build.built() == first
    assert compiled(compiler) == 1
    assert kept() == [first]
    assert first.read_text() == "compiled\n"


def test_another_source_compiler_or_processor_is_another_file(compiler, monkeypatch, tmp_path):
    found = [build.built()]
    for name, text in (("SOURCES", "int x;"), ("CPUINFO", "flags\t: none\n")):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setattr(build, name, (path,) if name == "SOURCES" else path)
        found.append(build.built())
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -O1")
    found.append(build.built())
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exit 3", "failed with exit code 3: it says nothing"),
        ('[ "$1" = --version ] && exit\necho x >&2; echo "a.cpp:1: error: no" >&2; exit 1',
         "failed with exit code 1: a.cpp:1: error: no"),
        ('[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done\necho junk > "$2"',
         "the compiled kernel cannot be loaded: "),
    ],
)  # fmt: skip
def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    text, told, monkeypatch, tmp_path, caplog
):
    path = script(tmp_path / "cc", text)
    monkeypatch.setenv("CXX", str(path))
    assert products.library() is None
    assert [record.message[: len(WARNING)] for record in caplog.records] == [WARNING]
    assert told in caplog.text
    folder = tmp_path / "cache" / "layer-streamer" / build.FOLDER
    assert not folder.exists() or all(p.suffix == ".so" for p in folder.glob("[!.]*"))
    assert not list(folder.glob(".*"))


def test_without_a_compiler_weights_are_unpacked_as_before_and_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    packed, x_TD = cases.blocks("Q8_0", 24, 64), torch.randn(1, 64)
    kinds = frozenset([("Q8_0", True)])
    unpacker = Unpacker(torch.device("cpu"), torch.float32, Widest(64, kinds))
    weight_ND = torch.empty(24, 64)
    unpack_rows(packed, 0, 24, weight_ND)
    for _ in range(3):
        assert torch.equal(project(x_TD, packed, unpacker), x_TD @ weight_ND.t())
    told = [record.message for record in caplog.records]
    assert told == [f"{WARNING}there is no C++ compiler (install g++ or clang, or name one in CXX)"]


def test_a_named_compiler_that_is_not_there_is_said(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/cc")
    assert products.library() is None
    assert "/nowhere/cc cannot be run (No such file or directory)" in caplog.text


def test_a_cache_that_cannot_be_written_is_said(compiler, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert products.library() is None
    assert WARNING in caplog.text
    assert compiled(compiler) == 0


def test_it_can_be_turned_off_without_a_word(compiler, monkeypatch, caplog):
    monkeypatch.setenv(library.SWITCH, "0")
    assert products.library() is None
    assert not compiler.exists()
    assert not caplog.records


needs_compiler = pytest.mark.skipif(
    not any(map(build.shutil.which, build.COMPILERS)), reason="there is no C++ compiler"
)
STUB = """
#include <cstdint>
struct Matrix { char nbytes[%d]; };
struct Look { char nbytes[%d]; };
extern "C" int host_lanes() { return 8; }
extern "C" int64_t host_matrix_nbytes() { return sizeof(Matrix); }
extern "C" int64_t host_look_nbytes() { return sizeof(Look); }
extern "C" int host_look(const Look *, int) { return 0; }
extern "C" void host_norm() {}
extern "C" void host_rotate() {}
extern "C" void host_gate() {}
extern "C" int host_multiply(const Matrix *, const float *, float *y, int64_t, int64_t, int) {
    y[0] = 2, y[1] = %d;
    return 0;
}
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Compiles in no time: the size of its matrices, and the second number that it gives."""

    def write(size: int, second: int) -> None:
        (tmp_path / "stub.cpp").write_text(STUB % (size, ctypes.sizeof(library.Look), second))
        monkeypatch.setattr(build, "SOURCES", (tmp_path / "stub.cpp",))

    return write


@needs_compiler
def test_a_file_that_was_damaged_in_the_cache_is_made_again(stub):
    stub(ctypes.sizeof(library.Matrix), 3)
    path = build.built()
    path.write_bytes(b"no library")
    assert products.library() is not None
    assert kept() == [path]


@needs_compiler
def test_one_that_computes_wrong_numbers_is_not_used(stub, caplog):
    stub(ctypes.sizeof(library.Matrix), 4)
    assert products.library() is None
    assert "the compiled kernel computed wrong numbers" in caplog.text


@needs_compiler
def test_one_of_another_layout_is_not_used(stub, caplog):
    stub(ctypes.sizeof(library.Matrix) + 8, 3)
    assert products.library() is None
    assert "its Matrix has another size" in caplog.text
