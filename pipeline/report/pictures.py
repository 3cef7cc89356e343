"""Images: sides, aspect, bytes and endings of those that were kept, and how many are the same."""

from typing import Any

from pipeline.report import histograms
from pipeline.report.ledgers import Ledgers

ASPECT_BINS = 10  # for each doubling of width over height
BYTES_BINS = 2  # for each doubling
_NUM_ENDINGS = 12
_SAMPLE_ROWS = 1_000_000

_SIDES_SQL = """
    SELECT {expression} AS bin, count(*) FROM raw
    WHERE verdict = 'kept' AND {expression} IS NOT NULL GROUP BY ALL
"""
_SHORT_SIDE = "least(original_width, original_height)"
_LONG_SIDE = "greatest(original_width, original_height)"
_ASPECT = f"""CASE WHEN original_width > 0 AND original_height > 0 THEN
    floor(log2(original_width::DOUBLE / original_height) * {ASPECT_BINS})::INTEGER END"""
_BYTES = f"CASE WHEN num_bytes > 0 THEN floor(log2(num_bytes) * {BYTES_BINS})::INTEGER END"
# 64 bits of a hash stand for the value: at 100 million images the chance of one accident is 1 in
# 4,000.
_SAME_SQL = """
    SELECT coalesce(sum(n), 0)::BIGINT, count(*), coalesce(sum(n) FILTER (n > 1), 0)::BIGINT,
           coalesce(max(n), 0)
    FROM (
        SELECT count(*) AS n FROM raw WHERE verdict = 'kept' AND {column} IS NOT NULL
        GROUP BY hash({column})
    )
"""
_ENDINGS_SQL = """
    WITH sampled AS (
        SELECT url FROM raw WHERE verdict = 'kept' AND url IS NOT NULL
        AND hash(url) % {every} = 0
    )
    SELECT lower(regexp_extract(split_part(split_part(url, '?', 1), '#', 1),
                                '^[^/]*//[^/]*/.*\\.([A-Za-z0-9]{{1,5}})$', 1)) AS ending, count(*)
    FROM sampled GROUP BY ALL ORDER BY 2 DESC, 1
"""


def pictures(ledgers: Ledgers) -> dict[str, Any]:
    """Return what kept images are like, as they were downloaded, and how many are the same.

    Sides are in pixels, exact. Aspect bins are tenths of a doubling of width over height, bins of
    bytes halves of one. Same by `sha256`: the same bytes; by `phash`: the same to the eye.
    """
    (kept,) = ledgers.row("SELECT count(*) FROM raw WHERE verdict = 'kept'")
    short = _histogram(ledgers, _SHORT_SIDE)
    long = _histogram(ledgers, _LONG_SIDE)
    every = max(1, kept // _SAMPLE_ROWS)
    endings = ledgers.rows(_ENDINGS_SQL.format(every=every))
    return {
        "kept": kept,
        "short_side": {**histograms.summary(short), "bins": histograms.as_pairs(_sides(short))},
        "long_side": {**histograms.summary(long), "bins": histograms.as_pairs(_sides(long))},
        "aspect": {"bins": histograms.as_pairs(_histogram(ledgers, _ASPECT))},
        "bytes": {"bins": histograms.as_pairs(_histogram(ledgers, _BYTES))},
        "same_bytes": _same(ledgers, "sha256"),
        "same_look": _same(ledgers, "phash"),
        "url_endings": {
            "one_url_in": every,
            "urls": sum(count for _, count in endings),
            "commonest": [{"ending": e or "(none)", "urls": n} for e, n in endings[:_NUM_ENDINGS]],
        },
    }


def _histogram(ledgers: Ledgers, expression: str) -> dict[int, int]:
    return dict(ledgers.rows(_SIDES_SQL.format(expression=expression)))


def _sides(counts: dict[int, int]) -> dict[int, int]:
    """Return sides in bins of 64 pixels."""
    return histograms.coarser(counts, 64)


def _same(ledgers: Ledgers, column: str) -> dict[str, int]:
    images, distinct, shared, most = ledgers.row(_SAME_SQL.format(column=column))
    return {"images": images, "distinct": distinct, "shared": shared, "most": most}
