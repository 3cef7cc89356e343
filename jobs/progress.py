"""Progress of long work: a live bar in a terminal, a plain line now and then anywhere else."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


class Meter(Protocol):
    """Takes the advance of one stage."""

    def advance(self, done: int, kept: int) -> None:
        """Add `done` rows to the count, `kept` of which succeeded."""


@dataclass
class StageCount:
    """How far a stage is; pure, so that its line can be tested."""

    title: str
    total: int
    unit: str
    done: int = 0
    kept: int = 0
    resumed: int = 0

    def add(self, done: int, kept: int) -> None:
        """Count `done` more rows, `kept` of them kept."""
        self.done += done
        self.kept += kept

    def kept_text(self) -> str:
        """Return the kept share, e.g. `93.1% kept`; nothing before the first row, or of steps."""
        return f"{self.kept / self.done:.1%} kept" if self.done and self.unit != "steps" else ""

    def line(self, elapsed_seconds: float) -> str:
        """Return one parseable line: stage, done/total, share, rate, kept share, time left."""
        rate = self.done / elapsed_seconds if elapsed_seconds > 0 else 0.0
        reached = self.resumed + self.done
        share = reached / self.total if self.total else 1.0
        parts = [
            f"{self.title}: {reached:,}/{self.total:,} {self.unit} ({share:.0%})",
            f"{rate:,.1f} {self.unit}/s",
        ]
        if kept := self.kept_text():
            parts.append(kept)
        if rate and reached < self.total:
            left = timedelta(seconds=round((self.total - reached) / rate))
            parts.append(f"{left} left")
        return ", ".join(parts)


@dataclass
class _LineMeter:
    """Writes a line every ten seconds; made for logs."""

    count: StageCount
    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)
    last_line: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.last_line = self.clock()

    def advance(self, done: int, kept: int) -> None:
        self.count.add(done, kept)
        if self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = self.clock()
            self.write()

    def write(self) -> None:
        self.stream.write(self.count.line(self.clock() - self.started) + "\n")
        self.stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.write()


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self._unit}/s" if task.speed else "")


@dataclass
class _BarMeter:
    """Moves a rich progress bar."""

    count: StageCount
    bar: Progress
    task: TaskID

    def advance(self, done: int, kept: int) -> None:
        self.count.add(done, kept)
        self.bar.update(self.task, advance=done, kept=self.count.kept_text())


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stage to be shown: what it is called, how many rows it has, how many it had before."""

    title: str
    total: int
    resumed: int = 0


@contextmanager
def stage_meter(
    title: str, total: int, *, unit: str, resumed: int = 0, stream: TextIO
) -> Iterator[Meter]:
    """Show the progress of one stage on `stream`, from `resumed` of `total` on, until left."""
    with stage_meters([Stretch(title, total, resumed)], unit=unit, stream=stream) as meters:
        yield meters[title]


@contextmanager
def stage_meters(
    stretches: Sequence[Stretch], *, unit: str, stream: TextIO
) -> Iterator[dict[str, Meter]]:
    """Show the progress of several stages at once, until left; the meters are by title."""
    counts = [StageCount(each.title, each.total, unit, resumed=each.resumed) for each in stretches]
    with ExitStack() as shown:
        if not stream.isatty():
            yield {
                each.title: shown.enter_context(_LineMeter(each, stream))
                for each in reversed(counts)  # which are left, and written, in their own order
            }
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TextColumn("{task.fields[kept]}"),
            TimeRemainingColumn(),
        )
        bar = shown.enter_context(Progress(*columns, console=Console(file=stream)))
        yield {
            each.title: _BarMeter(
                each,
                bar,
                bar.add_task(each.title, total=each.total, completed=each.resumed, kept=""),
            )
            for each in counts
        }
