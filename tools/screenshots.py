"""Take the documents' pictures of the dashboard, from a trained run.

python tools/screenshots.py runs/demo    # docs/images/dashboard_*.png; needs Chromium

Use a run that was stopped and resumed, with enough depth profiles for heat maps:
    keel train yaml/demo.yaml --processes 2 tracking.depth_every=4
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.browser import MISSING, Browser, browser

SIZE = (1360, 980)
LOW = 620
CHARTS = "^(train|validation)/(loss|grad_norm)$"


@contextmanager
def dashboard(run: Path) -> Iterator[str]:
    """`keel dashboard` over a run; the address of its page."""
    command = [sys.executable, "-u", "-m", "keel_megatron", "dashboard", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            for line in process.stdout or ():
                said += line
                if "until Ctrl-C" in line:
                    break
            found = re.search(r"http://\S+/runs/\w+\S*", said)
            if found is None:
                raise SystemExit(f"no page of a run:\n{said}")
            yield found[0]
        finally:
            process.terminate()


def page(address: str, tab: str) -> str:
    """A tab of a run's page."""
    path, _, query = address.rpartition("?")
    return f"{path}/{tab}?{query}"


def tidy(shown: Browser) -> None:
    """Close the assistant, and hide the charts' tools, which only a pointer would show."""
    close = "[aria-label='Close']"
    style = "const s = document.createElement('style'); s.textContent = '.modebar {display: none}';"
    shown.driver.execute_script(f"{style} document.head.append(s)")
    if shown.driver.execute_script("return document.querySelector(arguments[0]) !== null", close):
        shown.click(close)


def shoot(shown: Browser, out: Path, height: int = SIZE[1]) -> None:
    """A PNG of the window down to a height, packed as well as can be without a loss."""
    shown.driver.save_screenshot(str(out))
    with Image.open(out) as picture:
        box = (0, 0, picture.width, min(height, picture.height))
        picture.convert("RGB").crop(box).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    if MISSING is not None:
        raise SystemExit(MISSING)
    with dashboard(arguments.run) as address, browser(*SIZE) as shown:
        shown.open(page(address, "model-metrics"), "Auto-refresh")
        shown.type("input[placeholder='Search metric charts']", CHARTS)
        shown.wait(lambda: {"train/loss", "train/grad_norm"} <= shown.charts().keys(), "the charts")
        tidy(shown)
        shoot(shown, arguments.out / "dashboard_run.png", LOW)
        shown.open(page(address, "artifacts"), "depth_heat_maps.png")
        shown.click_text("depth_heat_maps.png")
        shown.wait(lambda: shown.image_width() > 500, "the heat maps")
        tidy(shown)
        shoot(shown, arguments.out / "dashboard_depth.png")


if __name__ == "__main__":
    main()
