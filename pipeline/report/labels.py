"""Captions that people have looked at, from a table on disk, and what the corpus knows of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from pipeline.report.ledgers import Ledgers
from pipeline.sample import Origin

_COLUMNS = ("source", "key", "origin", "index", "caption", "is_match")
_TRUE, _FALSE = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})
_LABELS_TABLE = """
    CREATE TABLE labels (number INTEGER, source VARCHAR, key VARCHAR, origin VARCHAR,
                         index INTEGER, text VARCHAR)
"""
_STORED_SQL = """
    SELECT DISTINCT ON (l.number) l.number, c.text, c.itm, c.itc, c.clip
    FROM captions AS c JOIN labels AS l ON c.source = l.source AND c.key = l.key AND (
        l.text = c.text OR (l.text IS NULL AND c.origin = l.origin AND c.index = l.index))
    ORDER BY l.number, c.origin, c.index
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPair:
    """A caption that somebody has looked at: one of the corpus, or a text of its own."""

    source: str
    key: str
    origin: str
    index: int
    is_match: bool
    text: str | None = None  # None: that of the corpus's caption of this origin and index


@dataclass(frozen=True, slots=True)
class StoredCaption:
    """What the corpus's caption ledgers hold of a labelled pair; None for a score not taken."""

    text: str | None
    itm: float | None
    itc: float | None
    clip: float | None


def read_labels(path: str, source: str | None = None) -> list[LabelledPair]:
    """Return the labels in a CSV file (with a header line), a Parquet or a JSON-lines file.

    Columns are source (may be missing where `source` is given), key, is_match (true or false, 1 or
    0), and caption, or where they are not "web" and 0 origin and index. Raises ValueError that
    names the file, the row and what is wrong.
    """
    with duckdb.connect(":memory:") as connection:
        try:
            table = _table(connection, path)
            # As text, so that a key such as 000042 stays what it is.
            chosen = [name for name in _COLUMNS if name in table.columns]
            rows = table.project(", ".join(f'"{name}"::VARCHAR' for name in chosen)).fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{path} cannot be read as a table of labels: {error}") from error
    given = set(chosen) if source is None else {*chosen, "source"}
    if missing := {"source", "key", "is_match"} - given:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    return [
        _label(path, number, {"source": source} | dict(zip(chosen, row, strict=True)))
        for number, row in enumerate(rows, start=1)
    ]


def stored_captions(ledgers: Ledgers, labels: Sequence[LabelledPair]) -> dict[int, StoredCaption]:
    """Return by its place in `labels` what the corpus has of each pair that it knows.

    A pair with a text of its own is known where its image has that very caption.
    """
    if not labels:
        return {}
    ledgers.execute(_LABELS_TABLE)
    for number, pair in enumerate(labels):
        ledgers.execute(
            "INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?)",
            [number, pair.source, pair.key, pair.origin, pair.index, pair.text],
        )
    return {row[0]: StoredCaption(*row[1:]) for row in ledgers.rows(_STORED_SQL)}


def _table(connection: duckdb.DuckDBPyConnection, path: str) -> duckdb.DuckDBPyRelation:
    if path.endswith(".parquet"):
        return connection.read_parquet(path)
    if path.endswith((".jsonl", ".ndjson")):
        return connection.read_json(path, format="newline_delimited")
    return connection.read_csv(path, header=True, all_varchar=True)


def _label(path: str, number: int, row: dict[str, str | None]) -> LabelledPair:
    where = f"{path}, row {number}"
    answer = (row["is_match"] or "").strip().lower()
    if answer not in _TRUE | _FALSE:
        raise ValueError(f"{where}: is_match is {row['is_match']!r}, neither true nor false")
    index = row.get("index") or "0"
    if not index.isdecimal():
        raise ValueError(f"{where}: index is {index!r}, not a whole number")
    return LabelledPair(
        source=row["source"] or "",
        key=row["key"] or "",
        origin=row.get("origin") or Origin.WEB.value,
        index=int(index),
        is_match=answer in _TRUE,
        text=row.get("caption") or None,
    )
