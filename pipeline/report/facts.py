"""What is known besides rows: stages and their state, times, what made the shards, training."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from pipeline.corpus import Corpus
from pipeline.layout import STAGES, UPSTREAM
from pipeline.report.downloads import over_time
from pipeline.report.ledgers import Ledgers, Shard, Snapshot
from pipeline.runfile import RunFileError

MAX_METRICS_BYTES = 32 * 2**20  # of a training's log; of a longer one the end is read
MAX_POINTS = 200  # of a curve
MAX_CURVES = 24  # of one training


def stages(snapshot: Snapshot) -> dict[str, Any]:
    """Return how far each stage is: shards, shards that wait for it, and those that are stale.

    A shard is stale when the shard it was made from has been replaced since.
    """
    found: dict[str, Any] = {}
    for stage in STAGES:
        records = {(r.source, r.index): r for r in snapshot.records(stage)}
        entry: dict[str, Any] = {
            "shards": len(records),
            "rows": sum(record.rows_in for record in records.values()),
            "sources": sorted({source for source, _ in records}),
            "bytes": sum(f.bytes for r in records.values() for f in r.files.values()),
            "damaged": [path for path in snapshot.damaged if path.startswith(f"{stage}/")],
            "waiting": 0,
            "stale": [],
        }
        if stage in UPSTREAM:
            above = {(r.source, r.index): r for r in snapshot.records(UPSTREAM[stage])}
            entry["waiting"] = len(above.keys() - records.keys())
            entry["stale"] = sorted(
                record.name
                for place, record in records.items()
                if place in above and record.inputs != above[place].sha256
            )
        found[stage] = entry
    return found


def times(snapshot: Snapshot) -> dict[str, Any]:
    """Return when each stage committed its first and last shard, and rows a second between.

    From when markers were written, which is all that a corpus knows of time: pauses count, and a
    corpus that was copied without its times shows those of the copy.
    """
    found: dict[str, Any] = {}
    for stage in STAGES:
        shards = snapshot.shards[stage]
        dated = sorted(s.committed_at for s in shards if s.committed_at)
        first, last = (dated[0], dated[-1]) if dated else (None, None)
        seconds = (last - first).total_seconds() if first and last else None
        # The first shard's own work lies before the first time that is known.
        later = sum(s.record.rows_in for s in shards if s.committed_at and s.committed_at != first)
        found[stage] = {
            "first": _text(first),
            "last": _text(last),
            "seconds": seconds,
            "rows_per_second": round(later / seconds, 3) if seconds else None,
            "over_time": over_time(shards),
        }
    ends = [s.committed_at for stage in STAGES for s in snapshot.shards[stage] if s.committed_at]
    total = (max(ends) - min(ends)).total_seconds() if ends else None
    return {
        "first": _text(min(ends, default=None)),
        "last": _text(max(ends, default=None)),
        "seconds": total,
        "stages": found,
    }


def _text(when: datetime | None) -> str | None:
    return when.isoformat(timespec="seconds") if when else None


def provenance(corpus: Corpus, ledgers: Ledgers) -> dict[str, Any]:
    """Return what made the shards: the recipe, each stage's settings, the models' fingerprints."""
    try:
        recipe, problem = corpus.read_run(), None
    except (RunFileError, UnicodeDecodeError) as error:
        recipe, problem = None, str(error)
    models = ledgers.rows(
        "SELECT captioner, filter, clip_model, count(*) FROM captions WHERE origin IS NOT NULL "
        "GROUP BY ALL ORDER BY 4 DESC, 1, 2, 3"
    )
    policies = ledgers.rows(
        "SELECT policy, count(*) FROM clean WHERE policy IS NOT NULL GROUP BY ALL "
        "ORDER BY 2 DESC, 1"
    )
    return {
        "recipe": recipe,
        "recipe_problem": problem,
        "stages": {stage: _makers(ledgers.snapshot.shards[stage]) for stage in STAGES},
        "models": [
            {"captioner": captioner, "filter": filter_, "clip_model": clip, "rows": rows}
            for captioner, filter_, clip, rows in models
        ],
        "policies": [{"policy": policy, "rows": rows} for policy, rows in policies],
    }


def _makers(shards: Iterable[Shard]) -> list[dict[str, Any]]:
    """Return each fingerprint of a stage with its settings, that of most shards first."""
    counts: Counter[str] = Counter()
    content: dict[str, Any] = {}
    for shard in shards:
        counts[shard.record.fingerprint] += 1
        content.setdefault(shard.record.fingerprint, shard.record.stats.get("content"))
    return [
        {"fingerprint": fingerprint, "shards": count, "settings": content[fingerprint]}
        for fingerprint, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def training(corpus: Corpus) -> list[dict[str, Any]]:
    """Return the curves of every training that left a log, thinned to what a page can show."""
    found = []
    for stage in sorted(corpus.store.list("train").folders):
        size = corpus.store.list(f"train/{stage}").sizes.get("metrics.jsonl")
        if size is None:
            continue
        with corpus.store.open(f"train/{stage}/metrics.jsonl") as stream:
            stream.seek(max(0, size - MAX_METRICS_BYTES))
            data = stream.read(MAX_METRICS_BYTES)
        curves, num_bad = read_curves(data.decode("utf-8", "replace").splitlines())
        found.append(
            {
                "stage": stage,
                "is_cut": size > MAX_METRICS_BYTES,
                "unreadable_lines": num_bad,
                "curves": {name: _thinned(curves[name]) for name in _in_order(curves)[:MAX_CURVES]},
            }
        )
    return found


def read_curves(lines: Iterable[str]) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Return (step, value) of every number in a log of JSON lines, and how many lines are none.

    A line without a step gets its number. The last value of a step counts: a training that was
    resumed wrote some twice.
    """
    curves: dict[str, dict[float, float]] = {}
    num_bad = 0
    for number, line in enumerate(lines):
        try:
            fields = json.loads(line)
        except ValueError:
            num_bad += 1
            continue
        if not isinstance(fields, dict):
            num_bad += 1
            continue
        step = fields.get("step", number)
        if not _is_number(step):
            num_bad += 1
            continue
        for name, value in _numbers(fields):
            curves.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}, num_bad


def _in_order(names: Iterable[str]) -> list[str]:
    """Return the loss, then what stands beside it, then what is grouped, such as the pace."""
    return sorted(names, key=lambda name: (name != "loss", "." in name, name))


def _numbers(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, dict) and not prefix:
            yield from _numbers(value, f"{name}.")
        elif _is_number(value) and name not in ("step", "time"):
            yield f"{prefix}{name}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: list[tuple[float, float]]) -> list[list[float]]:
    """Return at most MAX_POINTS points, evenly spread, with the first and the last."""
    if len(points) <= MAX_POINTS:
        return [list(point) for point in points]
    last = len(points) - 1
    chosen = {round(i * last / (MAX_POINTS - 1)) for i in range(MAX_POINTS)}
    return [list(points[i]) for i in sorted(chosen)]


def read_json(corpus: Corpus, path: str) -> object:
    """Return a file of the corpus that other commands leave for the report, if it is there.

    None if it is not. A file that is not JSON raises ValueError that names it.
    """
    data = corpus.store.read(path)
    if data is None:
        return None
    try:
        return json.loads(data, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it or make it again") from error


def _no_constant(name: str) -> None:
    """NaN and infinities are not JSON; a figure that is none is shown as missing."""
