"""Build the documentation site, and fail on what a reader would find broken.

python tools/docs_site.py                # make docs: build/site
python tools/docs_site.py --out FOLDER   # another folder; its contents are replaced

The builder reports links to pages and headings that do not exist. This program checks the pages
that it wrote as well: every link, picture, style and script leads to a file and a place that exist,
nothing is loaded from another server, and the navigation lists every page once.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.docs_stage import DOCS, PROJECT, stage

CONFIG = ROOT / "mkdocs.yml"
_ITEM = re.compile(r"^ +- (?:[^:#\n]+: )?(\S+\.md)$", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOADED = re.compile(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']?((?:https?:)?//\S+)")


@dataclass
class Page(HTMLParser):
    """What one page of the site contains and asks for."""

    path: Path
    places: set[str] = field(default_factory=set)
    """Anchors of the page."""
    links: set[str] = field(default_factory=set)
    """What a reader can follow."""
    parts: set[str] = field(default_factory=set)
    """What a browser loads by itself."""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.parts.add(values["href"])
        if "src" in values:
            self.parts.add(values["src"])


def build(site: Path) -> str:
    """Build the site; returns what the builder reports.

    Raises:
        SystemExit: the builder found an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copy(CONFIG, home)
        stage(home / "docs")
        done = subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--strict"],
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode == 0:
            shutil.rmtree(site, ignore_errors=True)
            site.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(home / "build" / "site", site)
    said = _COLOUR.sub("", done.stdout).partition("Traceback")[0].strip()
    if done.returncode:
        raise SystemExit(said)
    return said


def problems(site: Path) -> list[str]:
    """What is wrong with the pages of a built site; one line each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = [problem for page in pages.values() for problem in _of_page(page, pages, site)]
    for path in sorted(site.rglob("*.css")):
        loaded = _LOADED.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: loads {a or b}" for a, b in loaded]
    return found


def _of_page(page: Page, pages: dict[Path, Page], site: Path) -> Iterator[str]:
    name = page.path.relative_to(site)
    if name.name == "404.html":  # served at any address, so its links begin at the root
        return
    for url in sorted(page.links | page.parts):
        parts = urlsplit(url)
        if parts.scheme == "data" or (parts.scheme in ("http", "https") and url in page.links):
            continue
        if parts.scheme or parts.netloc:
            yield f"{name}: loads {url}"
            continue
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_relative_to(site.resolve()) or not target.is_file():
            yield f"{name}: {url} does not exist"
        elif (
            parts.fragment
            and target in pages
            and unquote(parts.fragment) not in (pages[target].places)
        ):
            yield f"{name}: {url}: no such heading"


def unlisted(nav: str | None = None) -> list[str]:
    """Pages that the navigation does not list exactly once, and entries without a page."""
    listed = _ITEM.findall((nav or CONFIG.read_text(encoding="utf-8")).partition("\nnav:")[2])
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | set(PROJECT)
    found = [f"{name} is not in the nav of mkdocs.yml" for name in pages - set(listed)]
    found += [f"mkdocs.yml: {name} does not exist" for name in set(listed) - pages]
    twice = {name for name in listed if listed.count(name) > 1}
    return sorted(found + [f"mkdocs.yml: {name} is listed twice" for name in twice])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    site: Path = parser.parse_args().out.absolute()
    wrong = unlisted()
    build(site)
    wrong += problems(site)
    if wrong:
        sys.exit("\n".join(wrong))
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages; read them with: {Path(sys.executable).name} -m http.server -d {site}")


if __name__ == "__main__":
    main()
