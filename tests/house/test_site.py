"""The docs as a site: its pages, its links, and that it can be built."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

SITE = ROOT / ".site"
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def gathering() -> dict[str, Any]:
    """The names of the script that gathers pages."""
    return runpy.run_path(str(SITE / "gather.py"))


@pytest.fixture
def gathered(gathering: dict[str, Any], tmp_path: Path) -> Path:
    gathering["gather"](tmp_path / "pages")
    return tmp_path / "pages"


def test_every_page_of_the_site_is_in_its_table_of_contents(gathering: dict[str, Any]) -> None:
    _, _, contents = (SITE / "mkdocs.yml").read_text().partition("\nnav:\n")
    assert sorted(re.findall(r": (\S+\.md)$", contents, re.MULTILINE)) == sorted(
        gathering["pages"]().values()
    )


def test_links_of_the_site_lead_to_its_pages_or_to_the_repository(gathered: Path) -> None:
    for page in gathered.rglob("*.md"):
        for match in LINK.finditer(page.read_text()):
            name, _, anchor = (match[1] or match[2]).partition("#")
            if name.startswith("http"):
                own = re.search(r"/(?:blob/main|layer-streamer/main)/(.+)", name)
                assert own is None or (ROOT / own[1]).exists(), (page, name)
                assert own is None or Path(own[1]).suffix not in (".md", ".svg"), (page, name)
                continue
            target = page.parent / name if name else page
            assert target.is_file(), (page, name)
            if anchor:
                assert target.suffix == ".md", (page, name)


def test_what_was_gathered_before_is_gone(gathering: dict[str, Any], gathered: Path) -> None:
    (gathered / "old.md").touch()
    gathering["gather"](gathered)
    assert not (gathered / "old.md").exists()
    assert (gathered / "index.md").read_text().startswith("# layer-streamer")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(gathered: Path, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install '.[docs]' has it")
    text = (SITE / "mkdocs.yml").read_text()
    for place in ("site-pages", "site"):
        text = text.replace(f": ../build/{place}\n", f": {tmp_path / place}\n")
    (tmp_path / "site-pages").symlink_to(gathered)
    (tmp_path / "mkdocs.yml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", tmp_path / "mkdocs.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "embedding" / "index.html").is_file()
