"""Captions that people have looked at, from a table on disk."""

from dataclasses import dataclass

import duckdb

from pipeline.sample import Origin

_COLUMNS = ("source", "key", "origin", "index", "is_match")
_TRUE, _FALSE = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPair:
    """A caption of the corpus that somebody has looked at."""

    source: str
    key: str
    origin: str
    index: int
    is_match: bool


def read_labels(path: str) -> list[LabelledPair]:
    """Return the labels in a CSV file (with a header line) or a Parquet file.

    Columns are source, key, is_match (true or false, 1 or 0), and where they are not "web" and 0
    origin and index. Raises ValueError that names the file, the row and what is wrong.
    """
    with duckdb.connect(":memory:") as connection:
        try:
            table = (
                connection.read_parquet(path)
                if path.endswith(".parquet")
                else connection.read_csv(path, header=True, all_varchar=True)
            )
            # As text, so that a key such as 000042 stays what it is.
            chosen = [name for name in _COLUMNS if name in table.columns]
            rows = table.project(", ".join(f'"{name}"::VARCHAR' for name in chosen)).fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{path} cannot be read as a table of labels: {error}") from error
    if missing := {"source", "key", "is_match"} - set(chosen):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    return [
        _label(path, number, dict(zip(chosen, row, strict=True)))
        for number, row in enumerate(rows, start=1)
    ]


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
    )
