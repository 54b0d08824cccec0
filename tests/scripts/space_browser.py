"""The Space in a headless browser: one page, what it shows, and everything that it asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the machine itself can be reached, so that a request elsewhere cannot succeed either.
_OPTIONS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
_WAIT, _STEP = 60_000, 50  # milliseconds
# Queue streams that the page ends itself when it is through with them.
_ENDED = "net::ERR_ABORTED"


def chromium() -> str:
    """The browser of this machine; the test is skipped without one."""
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else _NAMES)), None)
    if found is None:
        wanted = f"CHROMIUM={named}" if named else "chromium (apt install chromium) or CHROMIUM"
        pytest.skip(f"no browser: {wanted} was not found")
    return found


class SpacePage:
    """What a visitor does and sees."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.set_default_timeout(_WAIT)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("request", self._asked)
        page.on("requestfailed", self._failed)

    def open(self, url: str) -> None:
        self.page.goto(url)
        self._answered()

    def reload(self) -> None:
        self.page.reload()
        self._answered()

    def _answered(self) -> None:
        self.page.locator("#likeness").wait_for()
        self.page.locator("#change-map .js-plotly-plot").wait_for()

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def number(self, name: str) -> float:
        return float(self.text(name))

    def output(self, side: str) -> str:
        return self.text(f"{side}-output")

    def map(self, which: str) -> dict[str, Any]:
        """Tokens and written values of a map: `host`, `gravity` or `change`."""
        return self.page.evaluate(
            """which => {
                const plot = document.querySelector(`#${which}-map .js-plotly-plot`);
                const rows = [...plot.data[0].customdata];
                const weights = rows.map(row => [...row].map(cell => Number(cell[2])));
                return {tokens: [...plot.layout.xaxis.ticktext], weights};
            }""",
            which,
        )

    def write(self, text: str, box: str = "text") -> None:
        self.page.locator(f"#{box} textarea").fill(text)

    def press(self) -> None:
        self.page.locator("#compare").click()

    def turn(self, slider: str, place: int) -> None:
        self.page.locator(f"#{slider} input[type=range]").fill(str(place))

    def choose(self, label: str) -> None:
        self.page.get_by_label(label, exact=True).check()

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for an answer to be on the page."""
        for _ in range(_WAIT // _STEP):
            if is_so():
                return
            self.page.wait_for_timeout(_STEP)
        pytest.fail(f"the page never showed {what}; it says {self.page.inner_text('body')[:2000]}")

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(f"console: {message.text}")

    def _asked(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.wrong.append(f"asked another server: {request.url}")

    def _failed(self, request: Any) -> None:
        if request.failure != _ENDED:
            self.wrong.append(f"failed: {request.url} {request.failure}")


@contextmanager
def browser_page(url: str) -> Iterator[SpacePage]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=chromium(), args=_OPTIONS)
        visitor = SpacePage(browser.new_page(viewport={"width": 1400, "height": 1000}))
        visitor.open(url)
        yield visitor
        browser.close()
