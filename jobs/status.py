"""`capfilt status`: how far a run is, read from its corpus alone, so that no head has to be there.

Markers say what exists, and when it came to be; `run/status.json` says who was at it and what was
planned. Neither needs whoever wrote it to be alive.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.corpus_root import open_corpus
from jobs.durable import FILE, RunStatus, StageStatus
from jobs.durable import read_status as read_run_status
from jobs.errors import UserError
from jobs.training.config import STAGES, Stage
from pipeline.corpus import Corpus
from pipeline.layout import MARKER, RUN_FILE, parse_name
from pipeline.layout import STAGES as DATA_STAGES

_FAILURES_SHOWN = 10
# What local disks, S3, Google's buckets and memory call the time that a file was written.
_TIME_KEYS = ("mtime", "LastModified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Made:
    """What of one stage exists now, whoever made it."""

    folder: str
    num_shards: int
    last_commit: datetime | None


@dataclass(frozen=True, slots=True)
class Trained:
    """How far the training of one model is, whoever trains it."""

    stage: Stage
    step: int
    """Of the newest checkpoint; 0 before the first."""
    is_done: bool
    """Whether its export is there."""
    last_record: datetime | None
    """When its log was last written."""


@dataclass(frozen=True, slots=True)
class Status:
    """How far a run is, as the files in its root tell."""

    root: str
    asked: datetime
    run: RunStatus | None
    """What the last driver wrote; None if none ever did."""
    made: tuple[Made, ...]
    trained: tuple[Trained, ...] = ()

    @property
    def state(self) -> str:
        """The run in a word or two: running, died, stopped, done..."""
        return self.run.state(self.asked) if self.run is not None else "never run"

    def stage(self, folder: str) -> StageStatus | None:
        """Return what the last driver wrote of a stage."""
        stages = self.run.stages if self.run is not None else ()
        return next((each for each in stages if each.folder == folder), None)


def status_text(root: str, *, as_json: bool = False) -> str:
    """Return how far the run of a corpus is, for people or as one JSON document.

    Raises UserError where there is no corpus.
    """
    status = read_status(root, datetime.now(UTC))
    if as_json:
        return json.dumps(_to_json(status), indent=2)
    return "\n".join(_lines(status))


def read_status(root: str, now: datetime) -> Status:
    """Look at a corpus as it is `now`: a listing of each folder and one small file; writes nothing.

    Raises UserError where there is no corpus.
    """
    corpus = open_corpus(root)
    run = read_run_status(corpus)
    made = tuple(each for stage in DATA_STAGES if (each := _made(corpus, stage)) is not None)
    if run is None and not made and corpus.store.read(RUN_FILE) is None:
        raise UserError(f"{corpus.root}: no corpus here (neither {RUN_FILE} nor any shard)")
    trained = tuple(one for stage in STAGES if (one := _trained(corpus, stage)) is not None)
    return Status(corpus.root, now, run, made, trained)


def _made(corpus: Corpus, stage: str) -> Made | None:
    sources = corpus.sources(stage)
    if not sources:
        return None
    num_shards, times = 0, list[datetime]()
    for source in sources:
        path = corpus.store.full(f"{stage}/{source}")
        corpus.store.fs.invalidate_cache(path)
        for info in corpus.store.fs.ls(path, detail=True):
            name = parse_name(str(info["name"]).rsplit("/", 1)[-1])
            if name is not None and name.suffix == MARKER and not name.digest:
                num_shards += 1
                times.extend(_time_of(info))
    return Made(stage, num_shards, max(times, default=None))


def _trained(corpus: Corpus, stage: Stage) -> Trained | None:
    folder = f"train/{stage}"
    found = corpus.store.list(folder)
    if not found.folders and not found.sizes:
        return None
    steps = corpus.store.list(f"{folder}/checkpoints").folders
    return Trained(
        stage,
        step=max((int(each) for each in steps if each.isdigit()), default=0),
        is_done="capfilt.json" in corpus.store.list(f"{folder}/export").sizes,
        last_record=_written(corpus, f"{folder}/metrics.jsonl"),
    )


def _written(corpus: Corpus, path: str) -> datetime | None:
    try:
        info = corpus.store.fs.info(corpus.store.full(path))
    except FileNotFoundError:
        return None
    return next(_time_of(info), None)


def _time_of(info: dict[str, Any]) -> Iterator[datetime]:
    value = next((info[key] for key in _TIME_KEYS if info.get(key)), None)
    if isinstance(value, datetime):
        yield value if value.tzinfo else value.replace(tzinfo=UTC)
    elif isinstance(value, str):
        yield datetime.fromisoformat(value)
    elif value is not None:
        yield datetime.fromtimestamp(float(value), UTC)


# --- for people -------------------------------------------------------------------------------


def _lines(status: Status) -> Iterator[str]:
    run, now = status.run, status.asked
    yield f"run {run.name if run else '?'}: {status.state}, at {status.root}"
    if run is None:
        yield f"no driver has written {FILE} here"
    else:
        heard = f"last heard of {_ago(now, run.heartbeat_at)}"
        yield f"by {run.driver.who}, since {run.started_at:%Y-%m-%d %H:%M:%S} UTC, {heard}"
    yield from _table(status)
    yield from _models(status)
    if run is None:
        return
    yield from _troubles(run)
    if status.state not in ("running", "done") and run.command:
        yield f"to continue: {run.command}"


def _table(status: Status) -> Iterator[str]:
    head = ("stage", "shards", "left", "failed", "rows/s", "kept", "time left", "last commit")
    rows = [head, *(_row(status, made) for made in _all_stages(status))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _models(status: Status) -> Iterator[str]:
    for each in status.trained:
        if each.is_done:
            yield f"{each.stage}: trained"
            continue
        heard = f", log {_ago(status.asked, each.last_record)}" if each.last_record else ""
        yield f"{each.stage}: in training, last checkpoint at step {each.step:,}{heard}"


def _all_stages(status: Status) -> list[Made]:
    """Return the stages that have shards or are planned, in order."""
    made = {each.folder: each for each in status.made}
    stages = (made.get(folder, Made(folder, 0, None)) for folder in DATA_STAGES)
    return [each for each in stages if each.num_shards or status.stage(each.folder)]


def _row(status: Status, made: Made) -> tuple[str, ...]:
    told = status.stage(made.folder)
    last = _ago(status.asked, made.last_commit) if made.last_commit else "-"
    if told is None:
        return (made.folder, f"{made.num_shards:,}", "?", "-", "-", "-", "-", last)
    is_running = status.state == "running"
    eta = told.eta_seconds if is_running else None
    return (
        f"{made.folder} ({told.stage})",
        f"{made.num_shards:,}/{told.shards_total:,}",
        f"{max(0, told.shards_total - made.num_shards):,}",
        f"{told.shards_failed:,}",
        f"{told.rows_per_second:,.1f}" if is_running else "-",
        f"{told.kept_share:.1%}" if told.kept_share is not None else "-",
        _span(eta) if eta is not None else "-",
        last,
    )


def _troubles(run: RunStatus) -> Iterator[str]:
    for warning in run.warnings:
        yield f"warning: {warning}"
    for bug, times in run.bugs.items():
        yield f"a bug, met {times:,} times: {bug}"
    for failure in run.failures[:_FAILURES_SHOWN]:
        yield f"failed {failure.shard} after {failure.attempts} attempts: {failure.error}"
    if run.num_failures > _FAILURES_SHOWN:
        yield f"... and {run.num_failures - _FAILURES_SHOWN:,} shards more; --json lists a hundred"
    if run.note:
        yield f"it ended with: {run.note}"


def _ago(now: datetime, then: datetime) -> str:
    return f"{_span((now - then).total_seconds())} ago"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def _to_json(status: Status) -> dict[str, Any]:
    return {
        "root": status.root,
        "asked": status.asked.isoformat(),
        "state": status.state,
        "shards": {
            each.folder: {
                "made": each.num_shards,
                "last_commit": each.last_commit.isoformat() if each.last_commit else None,
            }
            for each in _all_stages(status)
        },
        "models": {
            each.stage: {
                "is_done": each.is_done,
                "checkpoint_step": each.step,
                "last_record": each.last_record.isoformat() if each.last_record else None,
            }
            for each in status.trained
        },
        "run": status.run.model_dump(mode="json") if status.run is not None else None,
    }
