"""`capfilt status`: how far a run is, read from its corpus alone, so that no head has to be there.

Markers say what exists, their times how fast it came to be. Both are right whoever has died.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from pipeline.corpus import Corpus
from pipeline.layout import MARKER, RUN_FILE, STAGES, UPSTREAM, parse_name
from pipeline.runfile import RunFileError

RATE_WINDOW = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class StageStatus:
    """How far one stage of one source is."""

    stage: str
    source: str
    shards_done: int
    shards_to_make: int | None
    """Shards that there are to be as far as is known now; None if nothing tells."""
    rows: int
    kept: int
    failed_rows: int
    bytes: int
    shards_per_hour: float
    """Over the last quarter of an hour."""
    last_commit: datetime | None
    num_damaged: int

    @property
    def shards_left(self) -> int | None:
        """Shards still to be made, as far as is known."""
        return None if self.shards_to_make is None else self.shards_to_make - self.shards_done


@dataclass(frozen=True, slots=True)
class Status:
    """How far a run is, as the files in its root tell."""

    root: str
    run: str
    stages: tuple[StageStatus, ...]
    asked: datetime


def status_text(root: str, *, as_json: bool = False) -> str:
    """Return how far the run of a corpus is, for people or as one JSON document.

    Raises UserError where there is no corpus.
    """
    status = read_status(root, datetime.now(UTC))
    if as_json:
        return json.dumps(_to_json(status), indent=2)
    return "\n".join(_lines(status))


def read_status(root: str, now: datetime) -> Status:
    """Look at a corpus as it is `now`; reads listings and markers, writes nothing.

    Raises UserError where there is no corpus.
    """
    corpus = open_corpus(root)
    recipe = _recipe(corpus)
    stages: list[StageStatus] = []
    for stage in STAGES:
        for source in corpus.sources(stage):
            upstream = UPSTREAM.get(stage)
            to_make = next(
                (s.shards_done for s in stages if (s.stage, s.source) == (upstream, source)), None
            )
            stages.append(_stage(corpus, stage, source, to_make, now))
    if not stages and not recipe:
        raise UserError(f"{corpus.root}: no corpus here (neither {RUN_FILE} nor any shard)")
    return Status(corpus.root, str(recipe.get("name", "?")), tuple(stages), now)


def _recipe(corpus: Corpus) -> dict[str, Any]:
    try:
        stored = corpus.read_run()
    except RunFileError as error:
        raise UserError(f"{corpus.root}: {error}") from error
    document = yaml.safe_load(stored) if stored else {}
    recipe = document.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _stage(
    corpus: Corpus, stage: str, source: str, to_make: int | None, now: datetime
) -> StageStatus:
    folder = corpus.scan(stage, source)
    times = _commit_times(corpus, folder.path)
    counts = Counter[str]()
    for record in folder.records.values():
        counts["rows"] += record.rows_in
        counts["kept"] += record.counts.kept
        counts["failed"] += sum(record.counts.failed.values())
        counts["bytes"] += sum(file.bytes for file in record.files.values())
    recent = sum(now - RATE_WINDOW < time <= now for time in times)
    return StageStatus(
        stage=stage,
        source=source,
        shards_done=len(folder.records),
        shards_to_make=to_make,
        rows=counts["rows"],
        kept=counts["kept"],
        failed_rows=counts["failed"],
        bytes=counts["bytes"],
        shards_per_hour=recent / (RATE_WINDOW / timedelta(hours=1)),
        last_commit=max(times, default=None),
        num_damaged=len(folder.damaged),
    )


def _commit_times(corpus: Corpus, folder: str) -> list[datetime]:
    """Return when each marker of a folder was written, as its disk or bucket remembers."""
    infos = corpus.store.fs.ls(corpus.store.full(folder), detail=True)
    times = []
    for info in infos:
        name = parse_name(str(info["name"]).rsplit("/", 1)[-1])
        if name is None or name.suffix != MARKER or name.digest:
            continue
        # Local disks, S3, Google's buckets and memory each call it otherwise.
        keys = ("mtime", "LastModified", "updated", "created")
        found = next((info[key] for key in keys if info.get(key)), None)
        if found is not None:
            times.append(_as_time(found))
    return times


def _as_time(value: Any) -> datetime:  # noqa: ANN401 (each filesystem has its own type)
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    return datetime.fromtimestamp(float(value), UTC)


def _lines(status: Status) -> Iterator[str]:
    yield f"run {status.run} at {status.root}, {status.asked:%Y-%m-%d %H:%M:%S} UTC"
    head = ("stage", "source", "shards", "left", "rows", "kept", "shards/h", "ETA", "last commit")
    rows = [head, *(_row(stage, status.asked) for stage in status.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
    for stage in status.stages:
        if stage.num_damaged:
            yield (
                f"{stage.num_damaged} markers of {stage.stage}/{stage.source} are damaged: "
                f"capfilt verify {status.root} says what to do"
            )


def _row(stage: StageStatus, now: datetime) -> tuple[str, ...]:
    total = "" if stage.shards_to_make is None else f"/{stage.shards_to_make:,}"
    return (
        stage.stage,
        stage.source,
        f"{stage.shards_done:,}{total}",
        "?" if stage.shards_left is None else f"{stage.shards_left:,}",
        f"{stage.rows:,}",
        f"{stage.kept / stage.rows:.1%}" if stage.rows else "-",
        f"{stage.shards_per_hour:,.0f}",
        _eta(stage),
        f"{_duration(now - stage.last_commit)} ago" if stage.last_commit else "-",
    )


def _eta(stage: StageStatus) -> str:
    if not stage.shards_left or not stage.shards_per_hour:
        return "-"
    return _duration(timedelta(hours=stage.shards_left / stage.shards_per_hour))


def _duration(span: timedelta) -> str:
    return str(timedelta(seconds=max(0, round(span.total_seconds()))))


def _to_json(status: Status) -> dict[str, Any]:
    return {
        "run": status.run,
        "root": status.root,
        "asked": status.asked.isoformat(),
        "stages": [
            {
                "stage": each.stage,
                "source": each.source,
                "shards_done": each.shards_done,
                "shards_to_make": each.shards_to_make,
                "rows": each.rows,
                "kept": each.kept,
                "failed_rows": each.failed_rows,
                "bytes": each.bytes,
                "shards_per_hour": each.shards_per_hour,
                "last_commit": each.last_commit.isoformat() if each.last_commit else None,
                "damaged_markers": each.num_damaged,
            }
            for each in status.stages
        ],
    }
