#!/usr/bin/env python3
"""The published results of the studies: their numbers, and what the pages show of them.

    python tools/study_pages.py runs/studies/alpha alpha-64   # publish a study's results
    python tools/study_pages.py                               # make tables and pictures again
    python tools/study_pages.py --check                       # do the tables show the numbers?

docs/studies/results/NAME.json has the numbers of one `keel study` and NAME.png is its picture. A
page shows its table.md between `<!-- results: NAME -->` and `<!-- /results -->`. The table and the
picture of a grid of runs are made from the numbers again; those of `redundancy` and
`gradient-flow` stay as they were published.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGES = ROOT / "docs" / "studies"
NUMBERS = PAGES / "results"
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
_NO_GRIDS = ("redundancy", "gradient-flow")


def module_of(found: dict[str, Any]) -> Any:
    """The module of a grid of runs, which makes its table and its picture; None of others."""
    if found["study"] in _NO_GRIDS:
        return None
    return importlib.import_module(f"keel_megatron.studies.{found['study'].replace('-', '_')}")


def numbers(name: str) -> dict[str, Any]:
    """What was published under a name."""
    found: dict[str, Any] = json.loads((NUMBERS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def with_tables(page: str) -> str:
    """A page with the tables of its grids made from the numbers."""

    def block(match: re.Match[str]) -> str:
        found = numbers(match[2])
        if (module := module_of(found)) is None:
            return match[0]
        heading = match[3].partition("\n|")[0]
        return f"{match[1]}{heading}\n{module.table(found['rows']).rstrip()}\n{match[4]}"

    return _BLOCK.sub(block, page)


def publish(folder: Path, name: str) -> None:
    """Keep a study's numbers and picture, and show its table on the pages that have its block.

    Raises:
        SystemExit: runs are missing.
    """
    from keel_megatron.studies.results import PICTURE, RESULTS, TABLE

    found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    if found["missing"]:
        sys.exit(f"{folder}: {len(found['missing'])} runs have no result yet")
    NUMBERS.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in found.pop("rows"))
    text = json.dumps(found | {"rows": "ROWS"}, indent=1).replace('"ROWS"', f"[\n{rows}\n]")
    (NUMBERS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(folder / PICTURE, NUMBERS / f"{name}.png")
    table = (folder / TABLE).read_text(encoding="utf-8")
    for path in PAGES.glob("*.md"):
        old = path.read_text(encoding="utf-8")
        new = _BLOCK.sub(
            lambda match: f"{match[1]}{table}{match[4]}" if match[2] == name else match[0], old
        )
        if new != old:
            path.write_text(new, encoding="utf-8")


def refresh(*, check: bool) -> None:
    """Make tables and pictures from the numbers; with `check` only compare the tables.

    Raises:
        SystemExit: a table does not show its numbers.
    """
    for path in sorted(PAGES.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        if (new := with_tables(old)) == old:
            continue
        if check:
            sys.exit(f"{path}: run python tools/study_pages.py")
        path.write_text(new, encoding="utf-8")
    for path in () if check else sorted(NUMBERS.glob("*.json")):
        found = numbers(path.stem)
        if (module := module_of(found)) is not None:
            module.picture(found["rows"], path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a study's folder, to be published")
    parser.add_argument("name", nargs="?", help="its name among the published results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if untrue")
    arguments = parser.parse_args()
    if arguments.folder is None:
        refresh(check=arguments.check)
    elif arguments.name is None:
        parser.error("give the results a NAME")
    else:
        publish(arguments.folder, arguments.name)


if __name__ == "__main__":
    main()
