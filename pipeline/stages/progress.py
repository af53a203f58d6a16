"""The progress of a stage: a bar on a terminal and in a notebook, and otherwise a line each half minute.

While nothing is finished, the time between two lines doubles, and each says how long it has been.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""Time between two lines."""


class ProgressUpdate(Protocol):
    """Function that moves a progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


class Position:
    """How far a stage is.

    Args:
        stage: Name of the stage.
        unit: Plural noun of what is counted. Default: nothing is counted.

    Attributes:
        stage, unit: As given.
        done, total: Numbers of finished and of all units; a total of 0 is not known yet.
        note: Further figures, such as the loss.
    """

    def __init__(self, stage: str, unit: str = "") -> None:
        self.stage, self.unit = stage, unit
        self.done = self.total = 0
        self.note = ""
        self._begun = self._changed = time.monotonic()
        self._start: tuple[float, int] | None = None

    def update(self, done: int, total: int, note: str = "") -> None:
        """Set the position."""
        if (done, total) != (self.done, self.total):
            self._changed = time.monotonic()
        self.done, self.total, self.note = done, total, note
        if self._start is None:  # Work of an earlier process doesn't count for the rate.
            self._start = time.monotonic(), done

    def line(self, repeated: bool = False) -> str:
        """Return the line that stands for the bar.

        Args:
            repeated: Whether the line before it had the same numbers. Default: False.
        """
        if not self.total or self._start is None:
            return f"{self.stage:7s} no {self.unit} finished yet, {_duration(time.monotonic() - self._begun)} since the start"
        since, before = self._start
        rate = (self.done - before) / max(time.monotonic() - since, 1e-9)
        parts = [f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"]
        if repeated:
            parts += [f"unchanged for {_duration(time.monotonic() - self._changed)}"]
        elif rate > 0:
            parts += [f"{rate:.3g} per second", f"{_duration((self.total - self.done) / rate)} left"]
        return f"{self.stage:7s} {', '.join(parts + [self.note] * bool(self.note))}"


@contextmanager
def shown(position: Position, console: Console) -> Iterator[ProgressUpdate]:
    """Show a position on a console while the block runs.

    Yields:
        A function that changes the position.
    """
    if console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal):
        with _bar(position, console) as update:
            yield update
        return
    done = threading.Event()

    def print_lines() -> None:
        for line in _lines(position, done.wait):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            console.file.flush()

    printer = threading.Thread(target=print_lines, daemon=True)
    printer.start()
    try:
        yield position.update
    finally:
        done.set()
        printer.join()


def _lines(position: Position, wait: Callable[[float], bool]) -> Iterator[str]:
    """Yield the lines to print until ``wait``, which waits for some seconds, returns whether all is done."""
    shown: tuple[int, int] | None = None
    quiet = skipped = 0
    while not wait(LINE_SECONDS):
        now = position.done, position.total
        if now == shown and skipped < quiet:
            skipped += 1
            continue
        repeated, quiet = now == shown, 2 * skipped + 1 if now == shown else 0
        shown, skipped = now, 0
        yield position.line(repeated)


@contextmanager
def _bar(position: Position, console: Console) -> Iterator[ProgressUpdate]:
    columns = (
        TextColumn(f"{position.stage:7s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(position.unit),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(position.stage, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            position.update(done, total, note)
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
