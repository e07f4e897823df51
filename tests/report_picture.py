"""A picture of the top of a report, for the README: `python -m tests.report_picture FOLDER FILE`.

The page is made anew from the tables of FOLDER into a temporary folder, so that the picture shows
the report of this code and FOLDER stays as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.report.page import REPORT_FILE, render
from ftsec_ray.results.read import Results
from tests import browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ViewportSize

WIDTH, MAX_HEIGHT = 1040, 1100
SCALES = (0.86, 0.75, 0.65)
"""Pixels per CSS pixel, the first that makes the picture small enough; at the first one it is as
wide as the text column of a README on GitHub.
"""
MAX_BYTES = 200_000
"""A README's picture is smaller than this."""


def picture_of(chrome: Browser, results: Path) -> bytes:
    """The header and the answer of a report as a PNG.

    Raises:
        SystemExit: the picture is too large for a README.
    """
    with tempfile.TemporaryDirectory() as scratch:
        page_file = Path(scratch) / REPORT_FILE
        page_file.write_text(render(Results.open(results)), encoding="utf-8")
        for scale in SCALES:
            picture = _shot(chrome, page_file, scale)
            if len(picture) < MAX_BYTES:
                return picture
    sys.exit(f"no picture of {results} is smaller than {MAX_BYTES:,} bytes")


def _shot(chrome: Browser, page_file: Path, scale: float) -> bytes:
    view: ViewportSize = {"width": WIDTH, "height": MAX_HEIGHT}
    page = chrome.new_page(viewport=view, device_scale_factor=scale)
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('.tools').forEach((one) => one.remove())")
    end = page.locator("#answer > p.ci, #answer .findings").last.bounding_box()
    height = min(MAX_HEIGHT, round(end["y"] + end["height"]) + 12) if end else MAX_HEIGHT
    picture = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    page.close()
    return picture


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="the top of a report as a PNG")
    parser.add_argument("results", type=Path, help="a results folder, such as results/quickstart")
    parser.add_argument("target", type=Path, help="the PNG to write")
    given = parser.parse_args(arguments)
    if browser.chromium() is None:
        sys.exit("no Chromium on this machine: install `chromium`, or name one in FTSEC_CHROMIUM")
    with browser.opened() as chrome:
        picture = picture_of(chrome, given.results)
    given.target.parent.mkdir(parents=True, exist_ok=True)
    given.target.write_bytes(picture)
    print(f"{given.target}: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
