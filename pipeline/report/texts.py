r"""Captions as texts: lengths, repeats, vocabulary, n-grams, scripts and classes of characters.

Lengths and repeats are counted over all captions. Words are counted over all captions of a small
corpus and a sample of a large one: the same captions each time, chosen by a hash; the share is in
`one_caption_in`. A word is a run of letters, marks and digits, in lower case.
"""

from typing import Any

from pipeline.report import histograms
from pipeline.report.ledgers import Ledgers

SAMPLE_CAPTIONS = 200_000
NUM_NGRAMS = 12
MAX_NGRAM = 3
MAX_WORD_CHARS = 40  # of what is shown of a word; a caption may be one
NUM_REPEATED = 12
MAX_REPEATED_CHARS = 120

SCRIPTS = {
    "Latin": r"\p{Latin}",
    "Cyrillic": r"\p{Cyrillic}",
    "Greek": r"\p{Greek}",
    "Han": r"\p{Han}",
    "Kana": r"[\p{Hiragana}\p{Katakana}]",
    "Hangul": r"\p{Hangul}",
    "Arabic": r"\p{Arabic}",
    "Hebrew": r"\p{Hebrew}",
    "Devanagari": r"\p{Devanagari}",
    "Thai": r"\p{Thai}",
}
CLASSES = {
    "no letters": r"^[^\p{L}]*$",
    "digits": r"[0-9]",
    "web address": r"(?i)(https?://|www\.)",
    "e-mail address": r"[A-Za-z0-9._+-]+@[A-Za-z0-9-]+\.[A-Za-z]",
    "file name": r"(?i)(\.(jpe?g|png|gif|webp|bmp)($|[^a-z])|(img|dsc)[_-]?[0-9])",
    "markup": r"<[/!A-Za-z]",
    "symbols": r"\p{So}",
    "control or bidi characters": (
        r"[\x{0}-\x{8}\x{B}-\x{1F}\x{7F}-\x{9F}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2066}-\x{2069}]"
    ),
}

_SCORED_TEXTS = """
    SELECT source, origin, text, hash(source, key, origin, index) AS place FROM captions
    WHERE origin IS NOT NULL AND text IS NOT NULL AND text != ''
"""
_RAW_TEXTS = """
    SELECT source, coalesce(origin, 'web') AS origin, caption AS text, hash(source, key) AS place
    FROM raw WHERE verdict = 'kept' AND caption IS NOT NULL AND caption != ''
"""
_LENGTHS_SQL = "SELECT origin, length(text)::INTEGER, count(*) FROM texts GROUP BY ALL"
# What is left of captions that differ in case, spaces and punctuation alone; 64 bits of its hash
# stand for it.
_PLAIN = r"regexp_replace(lower(text), '[^\p{L}\p{M}\p{N}]+', '', 'g')"
_REPEATS_SQL = f"""
    CREATE OR REPLACE TEMP TABLE repeats AS
    SELECT origin, hash({_PLAIN}) AS plain, count(*) AS n, min(place) AS place
    FROM texts GROUP BY ALL
"""
# One caption of each of the commonest; they are found again by their place, which is cheap to have.
_COMMONEST_SQL = """
    WITH commonest AS (
        SELECT place, n FROM repeats WHERE origin = ? AND n > 1 ORDER BY n DESC, place LIMIT ?
    )
    SELECT min(left(text, ?)), any_value(n) FROM texts JOIN commonest USING (place)
    WHERE origin = ? GROUP BY place ORDER BY 2 DESC, 1
"""
_SAMPLE_SQL = r"""
    CREATE OR REPLACE TEMP TABLE sample AS
    SELECT origin, text, regexp_extract_all(lower(text), '[\p{{L}}\p{{M}}\p{{N}}]+') AS words
    FROM texts WHERE place % {every} = 0
"""
_NGRAMS_SQL = """
    CREATE OR REPLACE TEMP TABLE ngrams AS
    SELECT origin, gram, count(*) AS n FROM (
        SELECT origin, unnest(list_transform(range(1, len(words) - {n} + 2),
            lambda i: array_to_string(words[i : i + {n} - 1], ' '))) AS gram
        FROM sample WHERE len(words) >= {n}
    ) GROUP BY ALL
"""


def texts(ledgers: Ledgers) -> dict[str, Any]:
    """Return what captions are like, by origin; of the raw stage where none is scored yet."""
    is_scored = bool(ledgers.snapshot.shards["captions"])
    ledgers.execute(
        f"CREATE OR REPLACE TEMP VIEW texts AS {_SCORED_TEXTS if is_scored else _RAW_TEXTS}"
    )
    lengths = histograms.collect(ledgers.rows(_LENGTHS_SQL))
    num_captions = sum(sum(counts.values()) for counts in lengths.values())
    every = max(1, num_captions // SAMPLE_CAPTIONS)
    ledgers.execute(_SAMPLE_SQL.format(every=every))
    repeats, words = _repeats(ledgers), _words(ledgers)
    return {
        "stage": "captions" if is_scored else "raw",
        "captions": num_captions,
        "one_caption_in": every,
        "by_origin": {
            origin: {
                "characters": {
                    **histograms.summary(lengths[(origin,)]),
                    "bins": histograms.as_pairs(histograms.coarser(lengths[(origin,)], 5)),
                },
                "repeats": repeats[origin],
                "words": words.get(origin),
            }
            for (origin,) in sorted(lengths)
        },
    }


def _repeats(ledgers: Ledgers) -> dict[str, Any]:
    """Return how many captions are near-identical to another of the same origin, and the worst."""
    ledgers.execute(_REPEATS_SQL)
    totals = ledgers.rows(
        "SELECT origin, sum(n)::BIGINT, count(*), coalesce(sum(n) FILTER (n > 1), 0)::BIGINT "
        "FROM repeats GROUP BY ALL"
    )
    found = {}
    for origin, captions, distinct, shared in totals:
        worst = ledgers.rows(_COMMONEST_SQL, [origin, NUM_REPEATED, MAX_REPEATED_CHARS, origin])
        found[origin] = {
            "captions": captions,
            "distinct": distinct,
            "shared": shared,
            "commonest": [{"text": text, "captions": n} for text, n in worst],
        }
    ledgers.execute("DROP TABLE repeats")
    return found


def _words(ledgers: Ledgers) -> dict[str, Any]:
    """Return word statistics of the sample by origin."""
    lengths = histograms.collect(
        ledgers.rows("SELECT origin, len(words)::INTEGER, count(*) FROM sample GROUP BY ALL")
    )
    found: dict[str, Any] = {
        origin: {
            "captions": sum(counts.values()),
            **histograms.summary(counts),
            "bins": histograms.as_pairs(counts),
            "ngrams": {},
        }
        for (origin,), counts in lengths.items()
    }
    for n in range(1, MAX_NGRAM + 1):
        _count_ngrams(ledgers, n, found)
    for name, patterns in (("scripts", SCRIPTS), ("classes", CLASSES)):
        for origin, counts in _matches(ledgers, patterns).items():
            found[origin][name] = counts
    return found


def _count_ngrams(ledgers: Ledgers, n: int, found: dict[str, Any]) -> None:
    ledgers.execute(_NGRAMS_SQL.format(n=n))
    totals = {
        origin: (total, distinct)
        for origin, total, distinct in ledgers.rows(
            "SELECT origin, sum(n)::BIGINT, count(*) FROM ngrams GROUP BY ALL"
        )
    }
    for origin, statistics in found.items():
        total, distinct = totals.get(origin, (0, 0))
        commonest = ledgers.rows(
            "SELECT left(gram, ?), n FROM ngrams WHERE origin = ? ORDER BY n DESC, gram LIMIT ?",
            [n * MAX_WORD_CHARS, origin, NUM_NGRAMS],
        )
        statistics["ngrams"][str(n)] = {
            "total": total,
            "distinct": distinct,
            "distinct_share": round(distinct / total, 6) if total else None,
            "commonest": [{"words": gram, "count": count} for gram, count in commonest],
        }
    ledgers.execute("DROP TABLE ngrams")


def _matches(ledgers: Ledgers, patterns: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return how many captions of the sample each pattern is found in, by origin."""
    counts = ", ".join("count(*) FILTER (regexp_matches(text, ?))" for _ in patterns)
    rows = ledgers.rows(
        f"SELECT origin, {counts} FROM sample GROUP BY ALL", list(patterns.values())
    )
    return {origin: dict(zip(patterns, found, strict=True)) for origin, *found in rows}
