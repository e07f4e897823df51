"""Progress of a run: a bar on a terminal, elsewhere a line every few seconds; failures are printed
at once.

Fed by the events of the engine. Progress and remaining time are counted in expected seconds of
work, since stages differ by orders of magnitude.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ftsec_ray.cli.console import shown, stderr
from ftsec_ray.cli.failure_text import headline
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.show import duration
from ftsec_ray.plan.stage import Stage

if TYPE_CHECKING:
    from ftsec_ray.schedule.execution import Event

LINE_EVERY_S = 10.0


EXPECTED_SHARE = 0.1
"""The expected pace counts as much as the pace over this share of the work."""


class Tally:
    """Counts of a run, from the plan and the events; it reads no clock and prints nothing."""

    def __init__(self, plan: Plan, done: Collection[str], costs: Callable[[Stage], float]) -> None:
        self._seconds = {stage.digest: costs(stage) for stage in plan.needed(done)}
        self._stages = plan.stages
        self._cells_of: dict[str, list[int]] = {}
        self._open: list[int] = []
        for index, cell in enumerate(plan.cells):
            left = [digest for digest in cell.stages if digest in self._seconds]
            self._open.append(len(left))
            for digest in left:
                self._cells_of.setdefault(digest, []).append(index)
        self.cells = len(plan.cells)
        self.cells_done = sum(left == 0 for left in self._open)
        self.stages = len(self._seconds)
        self.stages_held = sum(digest in done for digest in plan.stages)
        self.work_s = sum(self._seconds.values())
        self._done: set[str] = set()
        self._given_up: set[str] = set()
        """Stages that failed, and those that need their results."""
        self._running: dict[str, int] = {}
        self.failed = 0

    @property
    def stages_done(self) -> int:
        """Stages of this run that succeeded."""
        return len(self._done)

    @property
    def running(self) -> int:
        """Units that are running."""
        return len(self._running)

    @property
    def done_s(self) -> float:
        """Expected seconds of the stages that succeeded."""
        return sum(self._seconds[digest] for digest in self._done)

    def take(self, event: Event) -> None:
        """Count one event."""
        if event.kind == "started":
            self._running[event.unit] = len(event.stages)
            return
        self._running.pop(event.unit, None)
        if event.kind == "finished":
            for digest in event.stages:
                self._finish(digest)
        elif event.kind == "failed":
            self.failed += 1
            self._given_up.update(
                digest
                for digest in (*event.stages, *event.upstream_failed)
                if digest in self._seconds
            )

    def _finish(self, digest: str) -> None:
        if digest in self._done or digest not in self._seconds:
            return
        self._done.add(digest)
        for index in self._cells_of.get(digest, ()):
            self._open[index] -= 1
            self.cells_done += self._open[index] == 0

    def left_s(self, elapsed_s: float) -> float | None:
        """Remaining seconds at the pace so far, of which the expected pace is a part; None before
        any stage has succeeded.

        The first stages are short beside the start of Ray and of the workers, so that their pace
        alone says hours where minutes are left.
        """
        done, given_up = (
            self.done_s,
            sum(self._seconds[digest] for digest in self._given_up - self._done),
        )
        if not done:
            return None
        trust_s = EXPECTED_SHARE * self.work_s
        pace = (elapsed_s + trust_s / max(1, self.running)) / (done + trust_s)
        return pace * (self.work_s - done - given_up)

    def line(self, elapsed_s: float) -> str:
        """The counts in one line."""
        parts = [
            f"stages {self.stages_done}/{self.stages}",
            f"running {self.running}",
            f"cells {self.cells_done}/{self.cells}",
        ]
        if self.stages_held:
            parts.append(f"reused {self.stages_held}")
        if self.failed:
            parts.append(f"failed {self.failed}")
        left = self.left_s(elapsed_s)
        if left is not None and left >= 0.5:
            parts.append(f"about {duration(left)} left")
        return " | ".join(parts)

    def what(self, event: Event) -> str:
        """A unit in words: the kinds and methods of its stages."""
        names = []
        for digest in event.stages:
            stage = self._stages.get(digest)
            if stage is not None:
                model = f" of {stage.where['model']}" if "model" in stage.where else ""
                names.append(" ".join(part for part in (stage.kind, stage.method) if part) + model)
        return " > ".join(names) or event.unit[:8]


class LiveProgress:
    """Shows a Tally while a run lasts; its `on_event` is what the engine calls."""

    def __init__(
        self,
        tally: Tally,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = tally
        self._console = console or stderr()
        self._clock = clock
        self._bar: Progress | None = None

    def __enter__(self) -> LiveProgress:
        self._start = self._printed_s = self._clock()
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.tally.line(0.0), total=max(self.tally.work_s, 1e-9)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._say(self.tally.line(self._clock() - self._start))

    def follow(self, tally: Tally) -> None:
        """Show the counts of the stages that were added to the plan."""
        self._say(self.tally.line(self._clock() - self._start))
        self.tally, self._start = tally, self._clock()
        if self._bar is not None:
            self._bar.reset(self._task, total=max(tally.work_s, 1e-9), description=tally.line(0.0))

    def on_event(self, event: Event) -> None:
        """Count an event and show it."""
        self.tally.take(event)
        elapsed = self._clock() - self._start
        if event.kind in ("failed", "requeued"):
            what = "failed" if event.kind == "failed" else "worker died, retrying"
            self._say(f"{what}: {self.tally.what(event)}: {headline(event.error)}")
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.tally.done_s, description=self.tally.line(elapsed)
            )
        elif (
            event.kind == "started" and self._clock() - self._printed_s >= LINE_EVERY_S
        ):  # when a unit ends, nothing seems to run
            self._printed_s = self._clock()
            self._say(self.tally.line(elapsed))

    def _say(self, text: str) -> None:
        self._console.print(
            shown(text, one_line=True), markup=False, highlight=False, soft_wrap=True
        )
