"""What a run came to, for people, for machines, and as an exit code."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jobs.training.config import Stage
from jobs.watching import Watching
from pipeline.download_outcome import DownloadOutcome

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130


@dataclass(frozen=True, slots=True)
class StageSummary:
    """What one stage came to."""

    stage: str
    num_done: int
    """Shards that exist now, those of earlier runs included."""
    num_new: int
    """Shards that this run made or replaced."""
    counts: Counter[tuple[str, str]]
    """Rows of the new shards by verdict and reason."""
    busy_seconds: float
    wait_seconds: float
    times: dict[str, float]
    """Seconds within shards by what they were spent on."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Counts of shards and rows, and what went wrong."""

    stages: tuple[StageSummary, ...]
    failures: dict[str, str] = field(default_factory=dict)
    """Why a shard could not be made, by its name."""
    outcome: DownloadOutcome = field(default_factory=DownloadOutcome)
    bugs: dict[str, int] = field(default_factory=dict)
    """How often each exception of our own code was met."""
    warnings: tuple[str, ...] = ()
    is_stopped: bool = False
    report: str | None = None
    """The page to look at."""
    models: dict[Stage, dict[str, float]] = field(default_factory=dict)
    """What was trained on the clean corpus, and its figures on what none has seen."""

    @classmethod
    def of(cls, watching: Watching) -> "RunSummary":
        """Return what a run that has ended came to."""
        stages = tuple(
            StageSummary(
                stage=stage.name,
                num_done=len(stage.done),
                num_new=stage.num_new,
                counts=watching.accounts[stage.name].counts,
                busy_seconds=watching.accounts[stage.name].busy_seconds,
                wait_seconds=watching.accounts[stage.name].wait_seconds,
                times=dict(watching.accounts[stage.name].times),
            )
            for stage in watching.working
        )
        failures = {
            stage.tasks[key].name: _why(failure.problem.message, failure.attempts)
            for stage in watching.working
            for key, failure in stage.failures.items()
        }
        outcome = watching.download  # whose times are summed over workers
        outcome.elapsed_seconds = min(outcome.elapsed_seconds, watching.elapsed_seconds)
        return cls(
            stages=stages,
            failures=failures,
            outcome=outcome,
            bugs=dict(watching.bugs.counts),
            warnings=tuple(watching.warnings),
            is_stopped=watching.is_stopped,
        )

    @property
    def num_done(self) -> int:
        """Shards of all stages that exist now."""
        return sum(stage.num_done for stage in self.stages)

    @property
    def num_new(self) -> int:
        """Shards of all stages that this run made or replaced."""
        return sum(stage.num_new for stage in self.stages)

    @property
    def exit_code(self) -> int:
        """0 when all is done, 1 when shards failed, 130 when it was asked to stop."""
        if self.is_stopped:
            return INTERRUPTED
        return SOME_FAILED if self.failures else DONE

    def text(self, again: str) -> str:
        """Return the summary for people; `again` is the command line that continues."""
        return "\n".join(self._lines(again))

    def _lines(self, again: str) -> Iterator[str]:
        if self.outcome.total.num_rows:
            yield from self.outcome.lines()
        for name, problem in self.failures.items():
            yield f"failed {name}: {problem}"
        for bug, count in self.bugs.items():
            yield f"a bug of ours failed {count:,} shards, its trace is above: {bug}"
        for stage in self.stages:
            title = f"{stage.stage}: " if len(self.stages) > 1 else ""
            yield f"{title}{stage.num_done:,} shards done, {stage.num_new:,} of them now"
        if self.report:
            yield f"the report: {self.report}"
        for model, figures in self.models.items():
            found = "".join(f", {name} {value:.3f}" for name, value in figures.items())
            yield f"{model}: trained{found}"
        if self.failures:
            yield f"{len(self.failures):,} shards failed; to try them again: {again}"
        if self.is_stopped:
            yield f"stopped, nothing that was done is lost; to continue: {again}"

    def to_json(self) -> dict[str, Any]:
        """Return the same for machines; rows are the downloads', times seconds, sizes bytes."""
        total = self.outcome.total
        return {
            "shards_done": self.num_done,
            "shards_new": self.num_new,
            "shards_failed": self.failures,
            "is_stopped": self.is_stopped,
            "rows": total.num_rows,
            "kept": total.num_kept,
            "not_kept": {f"{v}: {r}": n for (v, r), n in sorted(total.causes.items())},
            "downloaded_bytes": total.num_bytes,
            "stored_bytes": self.outcome.stored_bytes,
            "elapsed_seconds": round(self.outcome.elapsed_seconds, 3),
            "stages": {stage.stage: _to_json(stage) for stage in self.stages},
            "bugs": self.bugs,
            "warnings": list(self.warnings),
            "report": self.report,
            "models": self.models,
        }


def _why(message: str, attempts: int) -> str:
    return f"{message} (after {attempts} attempts)" if attempts > 1 else message


def _to_json(stage: StageSummary) -> dict[str, Any]:
    rows = {
        f"{verdict}: {reason}" if reason else verdict: n
        for (verdict, reason), n in sorted(stage.counts.items())
        if n
    }
    return {
        "shards_done": stage.num_done,
        "shards_new": stage.num_new,
        "rows": rows,
        "busy_seconds": round(stage.busy_seconds, 3),
        "wait_seconds": round(stage.wait_seconds, 3),
        "times": {name: round(seconds, 3) for name, seconds in stage.times.items()},
    }
