"""How large the report of a 500-cell sweep with 100,000 generations is, how long it takes to write,
and how long a browser to open.

`python -m tests.benchmarks.bench_report`. Opening is timed in headless Chromium from the start of
the navigation to the first frame after the page's script has run, several times, each in a new
browser context.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ftsec_ray.report.page import write_report
from ftsec_ray.results.read import Results
from tests.benchmarks.synthetic import write_synthetic
from tests.browser import chromium, opened

MOST_BYTES, MOST_MS = 8_000_000, 2_000
FRAME = """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done({
  frame: performance.now(), painted: performance.getEntriesByName('first-contentful-paint')[0].startTime,
  interactive: performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd}))))"""
"""Milliseconds since the navigation began: now, and of the first picture, and when the script had
run.
"""


def open_times(page: Path, *, times: int) -> list[dict[str, float]]:
    """Milliseconds from the start of the navigation, `times` times."""
    found = []
    with opened() as browser:
        for _ in range(times):
            tab = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
            tab.goto(page.as_uri(), wait_until="domcontentloaded", timeout=120_000)
            found.append(tab.evaluate(FRAME))
            tab.context.close()
    return found


def main() -> int:
    """Print the figures; 1 where one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = write_synthetic(Path(scratch) / "synthetic")
        results = Results.open(folder)
        started = time.perf_counter()
        page = write_report(folder)
        took, size = time.perf_counter() - started, page.stat().st_size
        print(
            f"{results.cells.num_rows} cells, {results.generations.num_rows} generations:"
            f" {size / 1e6:.2f} MB, written in {took:.1f} s"
        )
        if chromium() is None:
            print("no Chromium here: opening it was not timed")
            return int(size > MOST_BYTES)
        times = open_times(page, times=given.times)
        for name, told in (
            ("interactive", "script has run"),
            ("painted", "first picture"),
            ("frame", "whole frame after the script"),
        ):
            values = [one[name] for one in times]
            print(
                f"  {told}: median {statistics.median(values):.0f} ms, longest {max(values):.0f} ms"
                f" of {len(values)}"
            )
        return int(size > MOST_BYTES or statistics.median(one["frame"] for one in times) > MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
