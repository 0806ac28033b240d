"""Style of the project's plots."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel_megatron.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, SLATE, ALARM = "#2b6cb0", "#dd6b20", "#4a5568", "#e5007d"
TEXT, QUIET, GRID, NOTHING = "#1a202c", "#718096", "#e2e8f0", "#edf2f7"
# A run may be named a$b, which is not a formula.
TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "color": TEXT, "parse_math": False}


def dress(axes: Axes) -> None:
    """Set a light frame and grid."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(color=QUIET, labelcolor=TEXT, labelsize=9.5)
    axes.tick_params(which="minor", length=0)


def picture(figure: Figure) -> bytes:
    """The figure as a PNG."""
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def save(figure: Figure, out: Path) -> None:
    """Write a PNG as `write_whole` does: atomically, without following links."""
    write_whole(out, picture(figure))
