"""Two corpora, or two policies over one: differences with confidence intervals, and what moved.

The unit is the row or the image, never the caption, for captions of one image are not independent.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.corpus import Corpus
from pipeline.layout import STAGES
from pipeline.report.ledgers import Ledgers, Row, Snapshot
from pipeline.sample import Origin

Z = 1.959964  # of a 95% interval
NUM_EXAMPLES = 12
_MAX_CAPTIONS = 6

_KEPT = "list_filter(captions, lambda c: c.verdict = 'kept')"
_MEAN_SQL = """
    SELECT count(x), avg(x), var_samp(x) FROM (SELECT ({expression})::DOUBLE AS x FROM {table})
    WHERE isfinite(x)
"""
# Measures of the samples that were kept, each of one number an image.
_PER_SAMPLE = (
    ("captions kept", "kept samples", "CASE WHEN verdict = 'kept' THEN num_kept END"),
    *(
        (
            f"mean {name.upper()} of kept captions",
            "kept samples",
            f"CASE WHEN verdict = 'kept' THEN "
            f"list_avg(list_transform({_KEPT}, lambda c: c.{name})) END",
        )
        for name in ("itm", "itc", "clip")
    ),
    (
        "characters in a kept caption",
        "kept samples",
        f"CASE WHEN verdict = 'kept' THEN "
        f"list_avg(list_transform({_KEPT}, lambda c: length(c.text))) END",
    ),
)
# Rows are the same when the list gave the same URL the same key.
_COMMON = """
    FROM clean AS a JOIN other_clean AS b
    ON a.source = b.source AND a.key = b.key AND a.url IS NOT DISTINCT FROM b.url
"""
_MOVES_SQL = f"""
    SELECT a.verdict = 'kept' AS in_a, b.verdict = 'kept' AS in_b, count(*) {_COMMON} GROUP BY ALL
"""
_MOVED_SQL = f"""
    SELECT {{side}}.source, {{side}}.key, {{lost}}.reason, list_transform({{side}}.captions,
        lambda c: c.text)
    {_COMMON} WHERE {{side}}.verdict = 'kept' AND {{lost}}.verdict != 'kept'
    ORDER BY hash({{side}}.source, {{side}}.key), {{side}}.source, {{side}}.key LIMIT ?
"""


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of both corpora and their difference, with its interval where it has one."""

    name: str
    of: str
    a: float | None
    b: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None


def compare(ledgers: Ledgers, other: Corpus, folder: str) -> dict[str, Any]:
    """Return how a corpus (A) differs from another (B), and which samples moved between them.

    `folder` is a local one, for links to the other's ledgers.
    """
    snapshot = Snapshot.take(other).pinned(folder)
    ledgers.register(other)
    for stage in STAGES:
        urls = [shard.url for shard in snapshot.shards[stage]]
        ledgers.add_table(f"other_{stage}", stage, urls)
    moves = _moves(ledgers)
    found = [asdict(measure) for measure in _measures(ledgers, moves)]
    return {"other": other.root, "measures": found, "moves": moves if moves["common"] else None}


def _measures(ledgers: Ledgers, moves: dict[str, Any]) -> Iterator[Measure]:
    yield share(
        "rows that gave an image",
        "rows in",
        *(_count(ledgers, f"{t}raw", "verdict = 'kept'") for t in ("", "other_")),
    )
    if moves["common"]:
        yield paired_share("samples kept", "rows that both judged", moves)
    else:
        yield share(
            "samples kept",
            "rows judged",
            *(_count(ledgers, f"{t}clean", "verdict = 'kept'") for t in ("", "other_")),
        )
    for name, of, expression in _PER_SAMPLE:
        yield mean(name, of, *_both_means(ledgers, "clean", expression))
    for origin in (Origin.WEB.value, Origin.SYNTHETIC.value):
        for score in ("itm", "clip"):
            first = f"CASE WHEN origin = '{origin}' AND index = 0 THEN {score} END"
            yield mean(
                f"mean {score.upper()} of the first {origin} caption",
                "images scored",
                *_both_means(ledgers, "captions", first),
            )


def _count(ledgers: Ledgers, table: str, condition: str) -> tuple[int, int]:
    part, whole = ledgers.row(f"SELECT count(*) FILTER ({condition}), count(*) FROM {table}")
    return part, whole


def _both_means(ledgers: Ledgers, stage: str, expression: str) -> tuple[Row, Row]:
    first, second = (
        ledgers.row(_MEAN_SQL.format(expression=expression, table=f"{prefix}{stage}"))
        for prefix in ("", "other_")
    )
    return first, second


def share(name: str, of: str, a: tuple[int, int], b: tuple[int, int]) -> Measure:
    """Return the difference of two shares (part, whole) with Newcombe's interval."""
    if not a[1] or not b[1]:
        return Measure(name, of, *(part / whole if whole else None for part, whole in (a, b)))
    (p, low_p, high_p), (q, low_q, high_q) = wilson(*a), wilson(*b)
    return Measure(
        name=name,
        of=of,
        a=p,
        b=q,
        difference=p - q,
        low=p - q - math.hypot(p - low_p, high_q - q),
        high=p - q + math.hypot(high_p - p, q - low_q),
    )


def wilson(part: int, whole: int) -> tuple[float, float, float]:
    """Return a share and Wilson's 95% interval for it."""
    p = part / whole
    middle = (p + Z * Z / (2 * whole)) / (1 + Z * Z / whole)
    half = Z * math.sqrt(p * (1 - p) / whole + Z * Z / (4 * whole * whole)) / (1 + Z * Z / whole)
    return p, min(p, middle - half), max(p, middle + half)


def paired_share(name: str, of: str, moves: dict[str, Any]) -> Measure:
    """Return the difference of two shares of the same rows, from those that moved alone."""
    num, came, left = moves["common"], moves["came"], moves["left"]
    difference = (came - left) / num
    variance = ((came + left) / num - difference**2) / num
    half = Z * math.sqrt(max(0.0, variance))
    return Measure(
        name=name,
        of=of,
        a=(moves["both"] + came) / num,
        b=(moves["both"] + left) / num,
        difference=difference,
        low=difference - half,
        high=difference + half,
    )


def mean(name: str, of: str, a: Row, b: Row) -> Measure:
    """Return the difference of two means (count, mean, variance) with Welch's interval.

    By the normal distribution: corpora are large.
    """
    if not a[0] or not b[0]:
        return Measure(name, of, a[1], b[1])
    difference = a[1] - b[1]
    if a[2] is None or b[2] is None:  # one image has no spread
        return Measure(name, of, a[1], b[1], difference)
    half = Z * math.sqrt(a[2] / a[0] + b[2] / b[0])
    return Measure(name, of, a[1], b[1], difference, difference - half, difference + half)


def _moves(ledgers: Ledgers) -> dict[str, Any]:
    counts = {(a, b): n for a, b, n in ledgers.rows(_MOVES_SQL)}
    left = ledgers.rows(_MOVED_SQL.format(side="b", lost="a"), [NUM_EXAMPLES])
    came = ledgers.rows(_MOVED_SQL.format(side="a", lost="b"), [NUM_EXAMPLES])
    return {
        "common": sum(counts.values()),
        "both": counts.get((True, True), 0),
        "neither": counts.get((False, False), 0),
        "came": counts.get((True, False), 0),
        "left": counts.get((False, True), 0),
        "left_examples": _examples(left),
        "came_examples": _examples(came),
    }


def _examples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {"source": source, "key": key, "reason": reason, "captions": captions[:_MAX_CAPTIONS]}
        for source, key, reason, captions in rows
    ]
