"""Write the tables of docs/compat.md from the patches' own entries.

python tools/compat_table.py          # rewrite docs/compat.md between its markers
python tools/compat_table.py --check  # fail if it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keel_megatron import compat
from keel_megatron.compat import patch_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compat.md"
BEGIN, END = "<!-- patches: tools/compat_table.py -->", "<!-- /patches -->"


def page() -> str:
    """The page with current tables."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _old, tail = rest.split(END)
    return f"{head}{BEGIN}\n{patch_table.markdown()}\n{END}{tail}"


def main() -> None:
    compat.install()
    new = page()
    if "--check" in sys.argv:
        same = new == PAGE.read_text(encoding="utf-8")
        sys.exit(0 if same else "docs/compat.md: run python tools/compat_table.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
