"""What a step's time consists of: a torch trace of a CPU step by kind of work, and one block.

keel bench CONFIG ... --processes 1 --profile trace.json
python tools/bench/trace.py trace.json                      # the table
python tools/bench/trace.py trace.json --write 'keel ...'   # docs/benchmarks/trace.md too

The training thread's time is attributed to the innermost running operator; the rest is Python:
modules, hooks, schedules. Tracing costs about as much as a small operator, so it overstates them.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.machines import cpu_name

PRODUCTS = re.compile(r"aten::(mm|addmm_?|bmm|baddbmm|matmul|linear)$")
ATTENTION = re.compile(r"scaled_dot_product|ScaledDotProduct")
LAYOUT = re.compile(
    r"aten::(view|as_strided|slice|select|t|transpose|permute|reshape|unbind|chunk|split|expand|"
    r"unsqueeze_?|squeeze|narrow|to|_to_copy|copy_|contiguous|clone|alias|detach_?|resolve_\w+|"
    r"_unsafe_view|_reshape_alias|new_\w+|empty\w*|zeros\w*|fill_|zero_|lift_fresh|result_type|"
    r"view_as|resize_)$"
)
OPTIMIZER = re.compile(r"Optimizer\.|_fused_adamw|_foreach")
KINDS = (
    ("products", "mm, addmm"),
    ("attention", "torch's kernel, both passes"),
    ("norms, SwiGLU, rotation, sums", "element-wise operators and sums of rows"),
    ("views, allocations, copies", "no arithmetic"),
    ("autograd's nodes", "custom autograd functions and the engine, between their operators"),
    ("AdamW, clipping", "foreach operators, and what they call"),
    ("Python", "modules, hooks, the schedule; outside operators"),
)
COLORS = ("#1f77b4", "#17becf", "#2ca02c", "#bcbd22", "#ff7f0e", "#9467bd", "#d9d9d9")


@dataclass
class Event:
    """One operator of the training thread; microseconds from the first one's begin."""

    name: str
    begin: float
    end: float
    kind: int
    depth: int = 0
    own: float = 0.0
    """Time in none of those that it calls."""


def kind_of(name: str) -> int:
    """An operator's index among KINDS."""
    for kind, pattern in ((5, OPTIMIZER), (1, ATTENTION), (0, PRODUCTS), (3, LAYOUT)):
        if pattern.search(name):
            return kind
    return 2 if name.startswith("aten::") else 4


def read(path: Path) -> list[Event]:
    """The operators of the busiest thread, nested: their depths and own times are set."""
    found = json.loads(path.read_text())["traceEvents"]
    rows: list[dict[str, Any]] = [e for e in found if e.get("cat") == "cpu_op"]
    thread = collections.Counter(row["tid"] for row in rows).most_common(1)[0][0]
    rows = sorted((r for r in rows if r["tid"] == thread), key=lambda r: (r["ts"], -r["dur"]))
    start = rows[0]["ts"]
    events, stack = [], list[Event]()
    for row in rows:
        begin = row["ts"] - start
        event = Event(row["name"], begin, begin + row["dur"], kind_of(row["name"]))
        event.own = row["dur"]
        while stack and stack[-1].end <= begin:
            stack.pop()
        if stack:
            event.depth = len(stack)
            stack[-1].own -= row["dur"]
            if stack[-1].kind == 5:
                event.kind = 5
        stack.append(event)
        events.append(event)
    return events


def table(events: list[Event]) -> list[str]:
    """Time and calls by kind, as Markdown."""
    span = max(event.end for event in events)
    times, calls = [0.0] * len(KINDS), [0] * len(KINDS)
    for event in events:
        times[event.kind] += event.own
        calls[event.kind] += 1
    times[-1] = span - sum(times)
    lines = ["| | share of the step | ms | calls | |", "|---|-:|-:|-:|---|"]
    for (name, words), time, count in zip(KINDS, times, calls, strict=True):
        shown = f"{count:,}" if count else ""
        lines.append(f"| {name} | {time / span:.0%} | {time / 1e3:,.0f} | {shown} | {words} |")
    lines.append(f"| a step, traced | 100% | {span / 1e3:,.0f} | {sum(calls):,} | |")
    return lines


def window(events: list[Event], marker: str, block: int) -> list[Event]:
    """From a block's call of `marker` (one a block) to the next block's."""
    marks = [event.begin for event in events if event.name == marker]
    return [e for e in events if marks[block] <= e.begin < marks[block + 1]]


def draw(events: list[Event], block: int, path: Path) -> None:
    """One block's operators as nested bars, forward above, backward below."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(2, 1, figsize=(16, 8))
    for axis, marker, title in (
        (axes[0], "_SplitRotary", "forward"),
        (axes[1], "_SplitRotaryBackward", "backward"),
    ):
        part = window(events, marker, block)
        origin, low = part[0].begin, min(event.depth for event in part)
        for event in part:
            width, level = event.end - event.begin, event.depth - low
            axis.barh(
                -level,
                width,
                left=event.begin - origin,
                height=0.92,
                align="center",
                color=COLORS[event.kind],
                edgecolor="white",
                linewidth=0.3,
            )
            label = event.name.removeprefix("aten::").strip("_")
            if width > 0.007 * len(label) * (part[-1].end - origin):
                axis.text(
                    event.begin - origin + width / 2,
                    -level,
                    label,
                    ha="center",
                    va="center",
                    fontsize=7,
                )
        axis.set_title(f"one block, {title}", loc="left")
        axis.set_yticks([])
        axis.set_xlim(0, part[-1].end - origin)
        axis.set_xlabel("µs (with tracing)")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    handles = [Patch(color=c, label=name) for c, (name, _) in zip(COLORS, KINDS, strict=True)]
    figure.legend(handles=handles[:-1], loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trace", type=Path, help="written by `keel bench --profile`")
    parser.add_argument("--block", type=int, default=20, help="which one is drawn (default 20)")
    parser.add_argument("--write", metavar="COMMAND", help="write the page; how the trace was made")
    arguments = parser.parse_args()
    events = read(arguments.trace)
    lines = table(events)
    print("\n".join(lines))
    if arguments.write is None:
        return
    draw(events, arguments.block, ROOT / "docs" / "images" / "trace.png")
    page = [
        "# Where the time of a step goes in a deep and narrow model",
        "",
        "One traced step: time is attributed to the innermost running operator. Tracing overstates",
        f"the time of small operators. {available_cores()} cores of {cpu_name()}, "
        f"{datetime.date.today()}.",
        "",
        f"`{arguments.write}`, then `python tools/bench/trace.py trace.json --write ...`",
        "",
        *lines,
        "",
        "![one block of it](../images/trace.png)",
    ]
    (ROOT / "docs" / "benchmarks" / "trace.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
