"""A headless Chromium that is installed on this machine, driven by Playwright; none is
downloaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The program: FTSEC_CHROMIUM, or the first of the usual names on the path."""
    return os.environ.get("FTSEC_CHROMIUM") or next(
        (found for name in NAMES if (found := shutil.which(name))), None
    )


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser without network use of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        arguments = [
            "--no-sandbox",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--disable-gpu",
            "--disable-lcd-text",
        ]
        browser = driver.chromium.launch(
            executable_path=chromium(), args=arguments, timeout=120_000
        )
        try:
            yield browser
        finally:
            browser.close()
