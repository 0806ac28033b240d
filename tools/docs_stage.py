"""The documentation site's sources: docs/, and what its pages link to outside of it.

On GitHub a link such as ../keel_megatron/training/run.py leads to the file. The site has a page for
every file and folder that is linked, so the link works there as well, without a network. Pages of
the repository's root that the navigation lists, such as CHANGELOG.md, are pages of the site.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages of the root, by the same name in the site."""
SOURCES = "source"
"""Folder of the pages that show files."""
_LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\"\s#]+)(#[^)\"\s]*)?(?=[)\"])")
_LIST = re.compile(r"(?:[-*+]|\d+\.) ")
_HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".json": "json"}


def stage(out: Path) -> None:
    """Write the site's sources to a folder that does not exist."""
    shutil.copytree(DOCS, out)
    shown: set[Path] = set()
    for page in sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in PROJECT)]):
        at = _place(page)
        text = page.read_text(encoding="utf-8")
        text = with_lists(_with_links(text, page.parent, at.parent, shown))
        (out / at).write_text(text, encoding="utf-8")
    while shown:
        path = shown.pop()
        at = out / _place(path)
        if not at.exists():
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_text(_HIDDEN + _shown(path, shown), encoding="utf-8")


def _place(path: Path) -> Path:
    """Where the site has a file of the repository, as a path within the site's sources."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS)
    name = path.relative_to(ROOT)
    return name if str(name) in PROJECT else Path(SOURCES) / f"{name}.md"


def _with_links(text: str, folder: Path, at: Path, shown: set[Path]) -> str:
    """A page's text whose links are right at its place in the site; adds to the shown files."""

    def new(match: re.Match[str]) -> str:
        before, url, fragment = match[1], match[2], match[3] or ""
        path = (folder / url).resolve()
        if ":" in url or not path.exists() or not path.is_relative_to(ROOT) or path == ROOT:
            return match[0]
        place = _place(path)
        if path == ROOT / "README.md":
            place, fragment = Path("index.md"), ""  # the site's own first page
        if place.parts[0] == SOURCES:
            shown.add(path)
            fragment = ""  # a line of the file
        return f"{before}{os.path.relpath(place, at)}{fragment}"

    return _LINK.sub(new, text)


def with_lists(text: str) -> str:
    """A page with a blank line between a paragraph and a list, which GitHub does not need."""
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        before = lines[-1] if lines else ""
        words = before[:1].strip() and not _LIST.match(before)
        if not fenced and _LIST.match(line) and words:
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _shown(path: Path, shown: set[Path]) -> str:
    """The page of a file or a folder."""
    name = path.relative_to(ROOT)
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if one.is_file())
        shown.update(inside)
        return f"# {name}/\n\n" + "".join(f"- [{one.name}]({one.name}.md)\n" for one in inside)
    text = path.read_text(encoding="utf-8")
    fence = "~" * 8
    return f"# {name}\n\n{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"
