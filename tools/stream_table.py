"""Write the table of docs/studies/stream-precision.md: what a bf16 stream keeps of an update.

python tools/stream_table.py          # rewrite the page between its markers; seconds
python tools/stream_table.py --check  # fail if the page has other numbers
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keel_megatron.studies.stored_update import kept_update

PAGE = Path(__file__).resolve().parent.parent / "docs" / "studies" / "stream-precision.md"
BEGIN, END = "<!-- kept: tools/stream_table.py -->", "<!-- /kept -->"
ALPHAS = (32, 64, 96, 128, 256, 512, 1024)
BRANCHES = (1.0, 0.1)
MODES = ("bf16", "bf16_add", "bf16_stochastic")


def table() -> str:
    """Markdown: a line for each alpha, three numbers for each branch and mode."""
    head = [f"std(F) = {std:g}, {mode}" for std in BRANCHES for mode in MODES]
    lines = [f"| alpha | {' | '.join(head)} |", "|--:" * (len(head) + 1) + "|"]
    for alpha in ALPHAS:
        cells = []
        for std in BRANCHES:
            for mode in MODES:
                kept = kept_update(mode, alpha, std)
                cells.append(f"{kept.cosine:.2f} / {kept.along:.2f} / {kept.unchanged:.0%}")
        lines.append(f"| {alpha} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    old = PAGE.read_text(encoding="utf-8")
    head, rest = old.split(BEGIN)
    new = f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        sys.exit(0 if new == old else f"{PAGE}: run python tools/stream_table.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
