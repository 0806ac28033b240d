"""Headless Chromium, for the browser test and the screenshots."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = (
    None if CHROMIUM and DRIVER else "needs Chromium: apt-get install chromium chromium-driver"
)
"""Why no browser is available; None if there is one."""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
)
_SECONDS = 60.0

T = TypeVar("T")


class Browser:
    """A page of Chromium.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, text: str) -> None:
        """Open a page and wait until a text is there."""
        self.driver.get(url)
        self.wait(lambda: text in self.text(), f"{text!r} at {url}")

    def text(self) -> str:
        """What the page says."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def click(self, selector: str) -> None:
        """Click the first element of a CSS selector once it is there."""
        script = (
            "const e = document.querySelector(arguments[0]); if (e) e.click(); return e !== null"
        )
        self.wait(lambda: self.driver.execute_script(script, selector), selector)

    def click_text(self, text: str) -> None:
        """Click the innermost element that says just this."""
        script = """
            const all = [...document.querySelectorAll('body *')];
            const said = all.filter(e => e.innerText && e.innerText.trim() === arguments[0]);
            if (said.length) said.at(-1).click();
            return said.length > 0"""
        self.wait(lambda: self.driver.execute_script(script, text), text)

    def type(self, selector: str, text: str) -> None:
        """Type into the first input of a CSS selector."""
        self.driver.find_element("css selector", selector).send_keys(text)

    def charts(self) -> dict[str, tuple[list[float], list[float]]]:
        """Steps and values of the lines that are drawn, by the metric's name."""
        script = """
            const found = {};
            for (const plot of document.querySelectorAll('.js-plotly-plot'))
                for (const line of plot.data || [])
                    found[line.metricKey || line.name] = [[...line.x], [...line.y]];
            return found"""
        return dict(self.driver.execute_script(script))

    def image_width(self) -> int:
        """Pixels of the widest picture that is loaded; 0 if none is."""
        script = """
            const shown = [...document.images].filter(i => i.complete && i.offsetWidth > 50);
            return Math.max(0, ...shown.map(i => i.naturalWidth))"""
        return int(self.driver.execute_script(script))

    def wait(self, ready: Callable[[], T], what: str) -> T:
        """Wait until a condition is true; its value.

        Raises:
            TimeoutException: it does not come true.
        """
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, _SECONDS, poll_frequency=0.1)
        value: T = waiting.until(lambda _driver: ready(), f"not there: {what}")
        return value


@contextmanager
def browser(width: int, height: int) -> Iterator[Browser]:
    """Chromium with a window of so many pixels and an empty profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(DRIVER))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
