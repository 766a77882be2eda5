"""Gathers the pages of the site from where they lie: docs/, and README and others at the top.

    python .site/gather.py OUT

OUT is made anew. Links between pages lead to the gathered ones, all others to the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
OWN = (
    f"{REPOSITORY}/blob/main/",
    f"{REPOSITORY.replace('//github', '//raw.githubusercontent')}/main/",
)
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s#]*)", re.MULTILINE)
NESTED = re.compile(r"^  (?=\* )", re.MULTILINE)
"""Points below points, which some readers of Markdown want to be further in."""
PICTURES = ("*.svg", "*.png")


def pages() -> dict[Path, str]:
    """Of each page its name in the site."""
    found = {ROOT / name: place for name, place in TOP.items()}
    docs = ROOT / "docs"
    for path in sorted(docs.rglob("*.md")):
        found[path] = path.relative_to(docs).as_posix().replace("README.md", "index.md")
    return found


def pictures() -> dict[Path, str]:
    """The same of pictures."""
    docs = ROOT / "docs"
    paths = (path for pattern in PICTURES for path in sorted(docs.rglob(pattern)))
    return {path: path.relative_to(docs).as_posix() for path in paths}


def moved(text: str, page: Path, places: dict[Path, str]) -> str:
    """The text of a page with its links as they are in the site."""
    here = Path(places[page]).parent

    def move(match: re.Match[str]) -> str:
        begin, link = match.groups()
        if own := next((own for own in OWN if link.startswith(own)), None):
            path = ROOT / link.removeprefix(own)
        elif not link or ":" in link:
            return match[0]
        else:
            path = (page.parent / link).resolve()
        if path in places:
            return begin + Path(os.path.relpath(places[path], here)).as_posix()
        return begin + OWN[0] + path.relative_to(ROOT).as_posix()

    return NESTED.sub("    ", LINK.sub(move, text))


def gather(out: Path) -> None:
    """Write all pages and pictures below ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    texts = pages()
    places = texts | pictures()
    for path, place in places.items():
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in texts:
            target.write_text(moved(path.read_text(), path, places))
        else:
            shutil.copyfile(path, target)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
