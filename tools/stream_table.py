"""Write the tables of docs/studies/stream-precision.md: what a bf16 stream keeps of a branch.

python tools/stream_table.py          # rewrite the page between its markers; seconds
python tools/stream_table.py --check  # fail if the page has other numbers
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keel_megatron.config.model import Stream
from keel_megatron.studies.stored_update import kept_update

PAGE = Path(__file__).resolve().parent.parent / "docs" / "studies" / "stream-precision.md"
MARKS = ("kept", "weights")
"""Of the two tables on the page."""
ALPHAS = (32, 64, 96, 128, 256, 512, 1024)
BRANCHES = (1.0, 0.1)
WEIGHTS = (0.0, 0.001, 0.01, 0.1)
MODES: tuple[Stream, ...] = ("bf16", "bf16_add", "bf16_stochastic")


def by_alpha() -> str:
    """Markdown: a line for each alpha, three numbers for each branch and mode; weights are 1."""
    head = [f"std(F) = {std:g}, {mode}" for std in BRANCHES for mode in MODES]
    rows = [
        [f"{alpha}", *(_cell(mode, alpha, std, 0.0) for std in BRANCHES for mode in MODES)]
        for alpha in ALPHAS
    ]
    return _markdown(["alpha", *head], rows)


def by_weights() -> str:
    """Markdown: a line for each spread of the norm weights, at std(F) = 0.1."""
    columns = [(alpha, mode) for alpha in (64, 1024) for mode in ("bf16", "bf16_stochastic")]
    rows = [
        [f"{spread:g}", *(_cell(mode, alpha, 0.1, spread) for alpha, mode in columns)]
        for spread in WEIGHTS
    ]
    head = [f"alpha = {alpha}, {mode}" for alpha, mode in columns]
    return _markdown(["std of the norm weights", *head], rows)


def _cell(mode: Stream, alpha: float, std: float, weight_std: float) -> str:
    kept = kept_update(mode, alpha, std, weight_std)
    return f"{kept.cosine:.2f} / {kept.along:.2f} / {kept.unchanged:.0%}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["--:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    old = new = PAGE.read_text(encoding="utf-8")
    for mark, table in zip(MARKS, (by_alpha(), by_weights()), strict=True):
        begin, end = f"<!-- {mark}: tools/stream_table.py -->", f"<!-- /{mark} -->"
        head, rest = new.split(begin)
        new = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    if "--check" in sys.argv:
        sys.exit(0 if new == old else f"{PAGE}: run python tools/stream_table.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
