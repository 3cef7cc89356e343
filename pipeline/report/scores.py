"""Scores: how ITM, ITC and CLIP are spread, and what other thresholds would keep."""

from collections.abc import Iterable
from typing import Any

from pipeline.report import histograms
from pipeline.report.ledgers import Ledgers

SCORES = ("itm", "itc", "clip")
FINE = 1000  # bins a unit, for percentiles
COARSE = 20  # how many of these make a bin that is drawn
ITM_BINS = 50  # a unit, of the joint histogram
CLIP_BINS = 100
MAX_SOURCES = 12  # with curves of their own; the others are drawn as one
OTHERS = "(other sources)"

_SPREAD_SQL = """
    SELECT source, origin, floor({score}::DOUBLE * {fine})::INTEGER AS bin, count(*)
    FROM captions WHERE {score} IS NOT NULL AND isfinite({score}) AND origin IS NOT NULL
    GROUP BY ALL
"""
_JOINT_SQL = f"""
    SELECT source, origin,
           CASE WHEN isfinite(itm) THEN floor(itm::DOUBLE * {ITM_BINS})::INTEGER END AS itm_bin,
           CASE WHEN isfinite(clip) THEN floor(clip::DOUBLE * {CLIP_BINS})::INTEGER END AS clip_bin,
           count(*)
    FROM captions WHERE origin IS NOT NULL AND verdict = 'kept' GROUP BY ALL
"""
_MISSING_SQL = """
    SELECT count(*) FILTER (verdict = 'kept'),
           count(*) FILTER (verdict = 'kept' AND itm IS NULL),
           count(*) FILTER (verdict = 'kept' AND itc IS NULL),
           count(*) FILTER (verdict = 'kept' AND clip IS NULL)
    FROM captions WHERE origin IS NOT NULL
"""


def scores(ledgers: Ledgers) -> dict[str, Any]:
    """Return each score's histogram and percentiles by origin, and by source and origin.

    A percentile is exact to 1/1000; a drawn bin is 0.02 wide and named by its lower edge's number.
    """
    captions, *missing = ledgers.row(_MISSING_SQL)
    spread: dict[str, Any] = {}
    for score, num_missing in zip(SCORES, missing, strict=True):
        found = histograms.collect(ledgers.rows(_SPREAD_SQL.format(score=score, fine=FINE)))
        origins = sorted({origin for _, origin in found})
        spread[score] = {
            "missing": num_missing,
            "by_origin": {
                origin: _spread(histograms.merged(c for (_, o), c in found.items() if o == origin))
                for origin in origins
            },
            "by_source": [
                {"source": source, "origin": origin, **_spread(found[source, origin])}
                for source, origin in sorted(found)
            ],
        }
    return {"captions": captions, "bin_width": COARSE / FINE, **spread}


def _spread(counts: dict[int, int]) -> dict[str, Any]:
    return {
        **histograms.summary(counts, 1 / FINE),
        "bins": histograms.as_pairs(histograms.coarser(counts, COARSE)),
    }


def explorer(ledgers: Ledgers) -> dict[str, Any]:
    """Return how many captions fall in each cell of ITM by CLIP, by source and origin.

    A cell is [source's number, origin's number, ITM bin, CLIP bin, count]; a score that was not
    taken is null. Any pair of thresholds on the edges of bins can be counted from these exactly.
    """
    rows = ledgers.rows(_JOINT_SQL)
    sources = _largest((row[0], row[4]) for row in rows)
    origins = sorted({row[1] for row in rows})
    cells: dict[tuple[int, int, int | None, int | None], int] = {}
    for source, origin, itm, clip, count in rows:
        named = source if source in sources else OTHERS
        cell = (sources.index(named), origins.index(origin), itm, clip)
        cells[cell] = cells.get(cell, 0) + count
    ordered = sorted(
        cells.items(), key=lambda item: tuple(-99999 if v is None else v for v in item[0])
    )
    return {
        "itm_step": 1 / ITM_BINS,
        "clip_step": 1 / CLIP_BINS,
        "sources": sources,
        "origins": origins,
        "cells": [[*cell, count] for cell, count in ordered],
    }


def _largest(counts: Iterable[tuple[str, int]]) -> list[str]:
    total: dict[str, int] = {}
    for source, count in counts:
        total[source] = total.get(source, 0) + count
    ranked = sorted(total, key=lambda source: (-total[source], source))
    if len(ranked) <= MAX_SOURCES:
        return sorted(ranked)
    return [*sorted(ranked[: MAX_SOURCES - 1]), OTHERS]
