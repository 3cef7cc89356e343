"""How a run goes, told to the terminal and to the corpus: one account of each stage."""

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

from jobs.board import Board, StageBoard
from jobs.catalogue import Catalogue, Place
from jobs.durable import FailedShard, Heart, StageStatus
from jobs.health import SuccessRate
from jobs.problems import BugTally, Kind, Problem
from jobs.progress import Meter, Stretch, stage_meters
from jobs.stages.stage import Made, Task
from pipeline.download_outcome import DownloadOutcome
from pipeline.record import Counts

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_TELLINGS = 1.0
_SECONDS_BETWEEN_CATALOGUES = 300.0
_FAILURES_TOLD = 100
_FIGURES = re.compile(r"[\d.,%]+")
_KIND_CHARS = 40


@dataclass
class StageAccount:
    """What one stage came to in this run."""

    total_rows: int
    rows_before: int
    live_rows: int = 0
    live_kept: int = 0
    """Of the shard that is being made in this process."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows of new shards by verdict and reason."""
    times: Counter[str] = field(default_factory=Counter)
    """Seconds of its makers by what they were spent on."""
    num_actors: int = 0
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass
class Watching:
    """Counts what the driver reports, moves the meters and fills in the status."""

    board: Board
    meters: Mapping[str, Meter]
    """Of the stages that this run works at, by name."""
    heart: Heart
    catalogue: Catalogue
    should_stop: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    accounts: dict[str, StageAccount] = field(init=False)
    download: DownloadOutcome = field(default_factory=DownloadOutcome)
    bugs: BugTally = field(default_factory=BugTally)
    warnings: list[str] = field(default_factory=list)
    is_stopped: bool = False
    _success: SuccessRate = field(default_factory=SuccessRate)
    _started_at: float = field(init=False)
    _told_at: float = field(init=False)
    _catalogued_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._started_at = self._catalogued_at = self.clock()
        self._told_at = float("-inf")
        self.accounts = {
            stage.name: StageAccount(
                total_rows=sum(task.num_rows for task in stage.tasks.values()),
                rows_before=sum(stage.tasks[key].num_rows for key in stage.done),
            )
            for stage in self.working
        }

    @property
    def working(self) -> list[StageBoard]:
        """The stages that this run works at."""
        return [stage for stage in self.board.stages if not stage.is_given]

    @property
    def elapsed_seconds(self) -> float:
        """Since the run began to make shards."""
        return self.clock() - self._started_at

    def wants_to_stop(self) -> bool:
        """Say whether the run is to stop: it was asked to, or another driver has taken over."""
        return self.should_stop() or self.heart.is_lost

    def rows(self, stage: str, done: int, kept: int) -> None:
        """Count rows of the shard that is being made in this process."""
        account = self.accounts[stage]
        account.live_rows += done
        account.live_kept += kept
        self.meters[stage].advance(done, kept)
        self.tell()

    def made(self, stage: str, task: Task, made: Made) -> None:
        """Count a shard that exists now; `stage` is what made it."""
        account = self.accounts[stage]
        self.meters[stage].advance(
            task.num_rows - account.live_rows, made.num_kept - account.live_kept
        )
        account.live_rows = account.live_kept = 0
        account.times.update(made.times)
        self.catalogue.note([(Place(task.folder, task.source, task.index), made.commit)])
        if made.is_new:
            account.counts.update(_tally(made.counts))
        if made.download is not None:
            self.download.merge(made.download)
            self.warn(self._success.add(made.download))
        self.tell()

    def failed(self, stage: str, task: Task, problem: Problem, *, is_set_aside: bool) -> None:
        """Note an attempt that came to nothing."""
        self.dropped_live(stage)
        if problem.kind is Kind.BUG and self.bugs.add(problem):
            _log.error(
                "a bug, met while making %s; the same one is only counted from now on:\n%s",
                task.name,
                problem.trace or problem.message,
            )
        what = "set aside" if is_set_aside else "to be tried again"
        _log.info("%s is %s (%s): %s", task.name, what, problem.kind, problem.message)
        self.tell()

    def dropped_live(self, stage: str) -> None:
        """Take back the rows of a shard that was begun here and came to nothing."""
        account = self.accounts[stage]
        self.meters[stage].advance(-account.live_rows, -account.live_kept)
        account.live_rows = account.live_kept = 0

    def warn(self, warning: str | None) -> None:
        """Say a warning once, however its figures change."""
        if warning is None:
            return
        kind = _FIGURES.sub("", warning)[:_KIND_CHARS]
        if kind not in {_FIGURES.sub("", said)[:_KIND_CHARS] for said in self.warnings}:
            _log.warning("%s", warning)
            self.warnings.append(warning)

    def tell(self, *, is_last: bool = False) -> None:
        """Fill in the status that the next heartbeat writes; once a second is enough."""
        now = self.clock()
        if not is_last and now - self._told_at < _SECONDS_BETWEEN_TELLINGS:
            return
        self._told_at = now
        if now - self._catalogued_at >= _SECONDS_BETWEEN_CATALOGUES:
            self._catalogued_at = now
            self.catalogue.save()
        failures = [
            FailedShard(
                shard=stage.tasks[key].name,
                error=failure.problem.message,
                attempts=failure.attempts,
            )
            for stage in self.working
            for key, failure in stage.failures.items()
        ]
        self.heart.tell(
            stages=tuple(self._status(stage, now - self._started_at) for stage in self.working),
            num_failures=len(failures),
            failures=tuple(failures[:_FAILURES_TOLD]),
            bugs=dict(self.bugs.counts),
            warnings=tuple(self.warnings),
        )

    def _status(self, stage: StageBoard, elapsed: float) -> StageStatus:
        account = self.accounts[stage.name]
        new_rows = stage.num_rows + account.live_rows
        rate = new_rows / elapsed if elapsed > 0 else 0.0
        reached = account.rows_before + new_rows
        return StageStatus(
            stage=stage.name,
            folder=stage.folder,
            shards_total=len(stage.tasks),
            shards_done=len(stage.done),
            shards_new=stage.num_new,
            shards_in_flight=len(stage.in_flight),
            shards_failed=len(stage.failures),
            rows_total=account.total_rows,
            rows_done=reached,
            rows_per_second=round(rate, 3),
            images_kept_per_second=round(stage.num_kept / elapsed if elapsed > 0 else 0.0, 3),
            kept_share=round(stage.num_kept / stage.num_judged, 4) if stage.num_judged else None,
            eta_seconds=round((account.total_rows - reached) / rate, 1) if rate else None,
            shard_seconds=_spread(list(stage.seconds)),
            actors=account.num_actors,
            busy_seconds=round(account.busy_seconds, 3),
            wait_seconds=round(account.wait_seconds, 3),
            times={name: round(seconds, 3) for name, seconds in account.times.items()},
        )


@contextmanager
def watched(
    board: Board, heart: Heart, catalogue: Catalogue, should_stop: Callable[[], bool]
) -> Iterator[Watching]:
    """Show the progress of a run on the terminal, and keep its status, until left."""
    stretches = [
        Stretch(
            stage.name,
            sum(task.num_rows for task in stage.tasks.values()),
            sum(stage.tasks[key].num_rows for key in stage.done),
        )
        for stage in board.stages
        if not stage.is_given
    ]
    with stage_meters(stretches, unit="rows", stream=sys.stderr) as meters:
        watching = Watching(board, meters, heart, catalogue, should_stop)
        watching.tell(is_last=True)
        try:
            yield watching
        finally:
            watching.tell(is_last=True)
            catalogue.save()


def _tally(counts: Counts) -> Counter[tuple[str, str]]:
    tally: Counter[tuple[str, str]] = Counter({("kept", ""): counts.kept})
    tally.update({("dropped", reason): n for reason, n in counts.dropped.items()})
    tally.update({("failed", reason): n for reason, n in counts.failed.items()})
    return tally


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    slowest_tenth = quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
    spread = {"median": median(seconds), "p90": slowest_tenth, "max": max(seconds)}
    return {name: round(value, 3) for name, value in spread.items()}
