"""What a person sees: what was asked for (answers, or with task=plan the plan) on stdout, all else on stderr."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task

Progress = Callable[[int, int, str], None]  # done, total (bytes), what is being worked on
Steps = Callable[[float, str, str, float | None], None]  # done (0 to 1), of what, its part, seconds left

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_BAR = 20  # columns: with the numbers and a name it fits into 80
_STEPS_BAR = 10  # beside a longer title, and the names of modules


def console(stream: Any = None) -> Console:
    """A rich console on stderr (or `stream`), as wide as the terminal, COLUMNS, or 110 columns."""

    stream = sys.stderr if stream is None else stream
    return _console_class()(file=stream, width=_width(stream.isatty()), highlight=False, soft_wrap=False)


def _width(terminal: bool) -> int | None:
    """Columns of a line; None: those that the terminal has, as long as it has them."""
    said = os.environ.get("COLUMNS", "")
    if not said.isdecimal():
        return None if terminal else 110
    return int(said) or (80 if terminal else 110)  # where it is 0, rich would print nothing


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            """Where the reader has gone is for the program to end; rich would exit here."""
            raise BrokenPipeError

    return Patient


def size(count: float) -> str:
    """Bytes as a person reads them: 1.50 GiB."""
    for unit in UNITS:
        if abs(count) < 1024 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def span(seconds: float) -> str:
    """A time as a person reads it: 45s, 14m, 2h 05m."""
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m"


def note(text: str) -> None:
    """One line for the person."""
    console().print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A bar with bytes and the time left on a terminal; a line every ten seconds elsewhere."""
    out = console()
    if not out.is_terminal:
        yield _lines(title)
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(_BAR), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), _what_column(), console=out) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)


@contextmanager
def steps(title: str) -> Iterator[Steps]:
    """A bar in per cent, for work that is not counted in bytes; a line a minute elsewhere than on a terminal."""
    out = console()
    if not out.is_terminal:
        yield _step_lines(title)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(_STEPS_BAR), TaskProgressColumn(), _time_column())
    with Bar(*columns, _what_column(), console=out) as bar:
        task = bar.add_task(title, total=1.0, what="", left=None)
        yield lambda done, what, module, left: bar.update(task, completed=done, what=module or what, left=left)


def _time_column() -> ProgressColumn:
    """What is left of the time, as it was given; until it is known, what has gone by."""
    from rich.progress import TimeElapsedColumn
    from rich.text import Text

    class Time(TimeElapsedColumn):
        def render(self, task: Task) -> Text:
            left = task.fields["left"]
            return super().render(task) if left is None else Text(f"{span(left)} left", "progress.remaining")

    return Time()


def _what_column() -> ProgressColumn:
    """What is being worked on, cut off where the line ends: the other columns give it the room that they leave."""
    from rich.progress import ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class What(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["what"], no_wrap=True, overflow="ellipsis")

    return What(Column(overflow="ellipsis"))


def _step_lines(title: str) -> Steps:
    last, said = time.monotonic(), ("", False)

    def show(done: float, what: str, module: str, left: float | None) -> None:
        nonlocal last, said
        news = what != said[0] or (bool(module) and not said[1])  # a step, or its first module
        if news or time.monotonic() - last > 60:
            last, said = time.monotonic(), (what, bool(module))
            more = [module] * bool(module) + ([] if left is None else [f"{span(left)} left"])
            print(f"{title}: {', '.join([what, f'{done:.0%}', *more])}", file=sys.stderr, flush=True)

    return show


def _lines(title: str) -> Progress:
    last = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{title}: {size(done)} of {size(total)} ({what})", file=sys.stderr, flush=True)

    return show
