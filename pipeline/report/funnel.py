"""The funnel: what became of every row, by source and stage, and of every caption."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.record import ShardRecord
from pipeline.report.ledgers import Ledgers, Row
from pipeline.sample import Verdict

_STAGE_SQL = "SELECT source, verdict, reason, count(*) FROM {stage} GROUP BY ALL"
_SCORED_SQL = """
    SELECT source, coalesce(origin, ''), verdict, reason, count(*) FROM captions GROUP BY ALL
"""
_SELECTED_SQL = """
    SELECT source, c.origin, c.verdict, coalesce(c.reason, ''), count(*)
    FROM (SELECT source, unnest(captions) AS c FROM clean) GROUP BY ALL
"""


def outcomes(rows: Iterable[Row]) -> dict[str, Any]:
    """Return counts by verdict and reason of (verdict, reason, count); commonest reason first."""
    tally: dict[str, Counter[str]] = {verdict.value: Counter() for verdict in Verdict}
    for verdict, reason, count in rows:
        tally[verdict][reason] += count
    kept = tally[Verdict.KEPT].total()
    return {
        "rows": sum(counts.total() for counts in tally.values()),
        "kept": kept,
        "dropped": _ranked(tally[Verdict.DROPPED]),
        "failed": _ranked(tally[Verdict.FAILED]),
    }


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def rows_by_source(ledgers: Ledgers, stage: str) -> dict[str, list[Row]]:
    """Return (verdict, reason, count) of a stage's ledger, by source."""
    found = defaultdict(list)
    for source, *rest in ledgers.rows(_STAGE_SQL.format(stage=stage)):
        found[source].append(tuple(rest))
    return dict(found)


def funnel(ledgers: Ledgers) -> dict[str, Any]:
    """Return what became of rows and captions, in total and by source.

    `selection` counts what the clean stage did to rows that it got: those that had an image. It
    covers the shards that are through that stage; `raw` all that were downloaded.
    """
    raw, clean = rows_by_source(ledgers, "raw"), rows_by_source(ledgers, "clean")
    scored, selected = _by_source(ledgers, _SCORED_SQL), _by_source(ledgers, _SELECTED_SQL)
    records = ledgers.snapshot.records
    upstream = {record.name.removeprefix("raw/"): record for record in records("raw")}
    sources = []
    for source in sorted({*raw, *clean, *scored, *selected, *_sources(records("raw"))}):
        came = [upstream.get(f"{r.source}/{r.index:05d}") for r in _of(records("clean"), source)]
        captioned = [
            upstream.get(f"{r.source}/{r.index:05d}") for r in _of(records("captions"), source)
        ]
        sources.append(
            {
                "source": source,
                "raw": outcomes(raw.get(source, [])),
                "images_scored": sum(r.counts.kept for r in captioned if r),
                "scoring": _captions(scored.get(source, [])),
                "clean": outcomes(clean.get(source, [])),
                "selection": _selection(clean.get(source, []), came),
                "captions": _captions(selected.get(source, [])),
            }
        )
    return {"total": _total(sources), "sources": sources}


def _sources(records: Iterable[ShardRecord]) -> set[str]:
    return {record.source for record in records}


def _of(records: Iterable[ShardRecord], source: str) -> Iterable[ShardRecord]:
    return (record for record in records if record.source == source)


def _by_source(ledgers: Ledgers, sql: str) -> dict[str, list[Row]]:
    found = defaultdict(list)
    for source, *rest in ledgers.rows(sql):
        found[source].append(tuple(rest))
    return dict(found)


def _captions(rows: Iterable[Row]) -> dict[str, Any]:
    """Return outcomes of (origin, verdict, reason, count) by origin; no origin is "none"."""
    by_origin = defaultdict(list)
    for origin, *rest in rows:
        by_origin[origin or "none"].append(tuple(rest))
    return {origin: outcomes(by_origin[origin]) for origin in sorted(by_origin)}


def _selection(clean: Iterable[Row], came: Iterable[ShardRecord | None]) -> dict[str, Any]:
    """Take away from a clean ledger what the raw shards had counted already."""
    rest = Counter({(verdict, reason): count for verdict, reason, count in clean})
    for record in came:
        if record is not None:
            for verdict, reasons in (
                (Verdict.DROPPED, record.counts.dropped),
                (Verdict.FAILED, record.counts.failed),
            ):
                for reason, count in reasons.items():
                    rest[verdict.value, reason] -= count
    return outcomes((verdict, reason, n) for (verdict, reason), n in rest.items() if n > 0)


def _total(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"images_scored": 0}
    for name in ("raw", "clean", "selection"):
        total[name] = _sum(source[name] for source in sources)
    for name in ("scoring", "captions"):
        origins = sorted({origin for source in sources for origin in source[name]})
        total[name] = {
            origin: _sum(source[name][origin] for source in sources if origin in source[name])
            for origin in origins
        }
    total["images_scored"] = sum(source["images_scored"] for source in sources)
    return total


def _sum(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows: list[Row] = []
    for part in parts:
        rows.append((Verdict.KEPT.value, "", part["kept"]))
        for verdict in (Verdict.DROPPED.value, Verdict.FAILED.value):
            rows += [(verdict, reason, count) for reason, count in part[verdict].items()]
    return outcomes(rows)
