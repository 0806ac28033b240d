"""Write docs/reference/ from the code: settings, commands, exit codes, files.

python tools/reference_pages.py          # rewrite the pages
python tools/reference_pages.py --check  # fail if one is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.reference import commands, files, settings

FOLDER = ROOT / "docs" / "reference"
PAGES = {
    "settings": settings.page,
    "commands": commands.page,
    "exit-codes": files.exit_code_page,
    "run-folder": files.run_folder_page,
    "file-formats": files.formats_page,
}
NOTE = "<!-- Written by python tools/reference_pages.py: change the code instead. -->\n\n"


def pages() -> dict[Path, str]:
    """The pages' texts."""
    return {FOLDER / f"{name}.md": NOTE + page() for name, page in PAGES.items()}


def main() -> None:
    written = pages()
    if "--check" in sys.argv:
        old = [path.name for path, text in written.items() if path.read_text("utf-8") != text]
        sys.exit(f"{', '.join(old)}: run python tools/reference_pages.py" if old else 0)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
