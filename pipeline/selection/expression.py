"""Conditions in SQL: one scalar, repeatable, boolean expression over what is known of a caption.

DuckDB parses and evaluates it, in a connection that can reach no file, no network and no setting.
What it parsed to is looked at as well: whatever could read other rows, other tables, the clock or
chance is refused before the run.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.sample import ShardError
from pipeline.selection.candidates import SCORES, Block

_MEMORY_LIMIT = "1GB"
_TABLE = "captions"
# What may be referred to, with DuckDB's types.
COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "source": pa.string(),
    "url": pa.string(),
    "text": pa.string(),
    "origin": pa.string(),
    "index": pa.int32(),
    "num_tokens": pa.int32(),
    "itm": pa.float32(),
    "itc": pa.float32(),
    "clip": pa.float32(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "extra": pa.string(),
}
_OF_IMAGE = (
    "source",
    "url",
    "width",
    "height",
    "original_width",
    "original_height",
    "extra",
)
_HARMLESS = frozenset(
    {
        "BETWEEN",
        "CASE",
        "CAST",
        "COLLATE",
        "COLUMN_REF",
        "COMPARISON",
        "CONJUNCTION",
        "CONSTANT",
        "FUNCTION",
        "OPERATOR",
        "TYPE",
    }
)
_ONLY_A_LIST = (
    "where_clause",
    "group_expressions",
    "group_sets",
    "having",
    "sample",
    "qualify",
    "modifiers",
)


class ExpressionError(ValueError):
    """An expression that is no condition, with what is wrong and what may be used."""

    def __init__(self, expression: str, problem: str) -> None:
        super().__init__(
            f"expression {expression!r}: {problem}; it has to be one condition over the columns "
            f"{', '.join(COLUMNS)}, for example: itm >= 0.4 AND length(text) < 200"
        )


class SqlCondition:
    """A checked expression; calling it with a block says for which captions it is true."""

    def __init__(self, expression: str) -> None:
        """Raises ExpressionError."""
        self._expression = expression
        self._connection = _locked_connection()
        try:
            node = self._parse()
            self.columns = frozenset(self._check(node))
            self._check_type()
        except duckdb.Error as error:
            raise ExpressionError(expression, _first_line(error)) from error

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the scores that it looks at."""
        return tuple(name for name in SCORES if name in self.columns)

    def __call__(self, block: Block) -> NDArray[np.bool_]:
        """Return (M,) flags, true where the condition is; unknown is not true.

        Raises ShardError where a value of the block makes it fail.
        """
        table = _visible(block)
        if not table.num_rows:
            return np.zeros(0, bool)
        try:
            result = self._evaluate(table).to_arrow_table()
        except duckdb.Error as error:
            raise ShardError(
                f"samples {table['key'][0]} to {table['key'][-1]}: expression "
                f"{self._expression!r} fails: {_first_line(error)}; make it bear such values, for "
                "example with TRY_CAST"
            ) from error
        flags: NDArray[np.bool_] = result.column(0).to_numpy().astype(bool)
        assert len(flags) == table.num_rows, "a scalar expression has one value a row"
        return flags

    def _evaluate(self, table: pa.Table) -> duckdb.DuckDBPyRelation:
        # On a line of its own, so that a comment at its end hides nothing of ours.
        return self._connection.from_arrow(table).project(
            f"coalesce((\n{self._expression}\n), false) AS is_true"
        )

    def _parse(self) -> Mapping[str, Any]:
        text = f"SELECT\n{self._expression}"
        found = self._connection.execute("SELECT json_serialize_sql(?)", [text]).fetchone()
        assert found is not None
        parsed = json.loads(found[0])
        if parsed.get("error"):
            raise ExpressionError(self._expression, parsed["error_message"])
        if len(parsed["statements"]) != 1:
            raise ExpressionError(self._expression, "it is more than one statement")
        node: Mapping[str, Any] = parsed["statements"][0]["node"]
        return node

    def _check(self, node: Mapping[str, Any]) -> Iterator[str]:
        """Yield the columns that are referred to. Raises ExpressionError for what may not be."""
        is_bare = (
            node["type"] == "SELECT_NODE"
            and len(node["select_list"]) == 1
            and not node["select_list"][0].get("alias")
            and node["from_table"]["type"] == "EMPTY"
            and not node["cte_map"]["map"]
            and not any(node.get(part) for part in _ONLY_A_LIST)
        )
        if not is_bare:
            raise ExpressionError(self._expression, "it is more than an expression")
        functions = self._repeatable_functions()
        for part in _parts(node["select_list"][0]):
            kind = part["class"]
            if kind not in _HARMLESS:
                raise ExpressionError(
                    self._expression, f"{kind.lower().replace('_', ' ')} is not allowed in it"
                )
            if kind == "FUNCTION" and part["function_name"].lower() not in functions:
                raise ExpressionError(
                    self._expression,
                    f"{part['function_name']}() is no function of one row's values that gives the "
                    "same on any day",
                )
            if kind == "COLUMN_REF":
                yield part["column_names"][-1].lower()

    def _repeatable_functions(self) -> set[str]:
        """Return the scalar functions that know neither chance, clock nor settings."""
        rows = self._connection.execute(
            "SELECT function_name FROM duckdb_functions() "
            "WHERE function_type IN ('scalar', 'aggregate', 'macro') GROUP BY function_name "
            "HAVING bool_and(function_type = 'scalar' AND stability = 'CONSISTENT')"
        ).fetchall()
        return {name.lower() for (name,) in rows}

    def _check_type(self) -> None:
        """Bind it to an empty table, for what only the columns' types can show."""
        empty = pa.schema(list(COLUMNS.items())).empty_table()
        relation = self._connection.from_arrow(empty).project(f"(\n{self._expression}\n) AS value")
        if str(relation.types[0]) != "BOOLEAN":
            raise ExpressionError(
                self._expression, f"it gives {relation.types[0]}, not true or false"
            )


def _visible(block: Block) -> pa.Table:
    """Return (M,) rows with the columns that an expression may refer to."""
    captions = block.captions
    of_image = block.rows.select(list(_OF_IMAGE)).take(captions.row)
    columns = [
        (of_image if name in _OF_IMAGE else captions.table)[name].cast(kind)
        for name, kind in COLUMNS.items()
    ]
    return pa.table(columns, names=list(COLUMNS))


def _locked_connection() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": "",
            "threads": "1",
        },
    )
    connection.execute("SET lock_configuration = true")
    return connection


def _parts(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield every part of a parsed expression that has a class."""
    if isinstance(value, dict):
        if "class" in value:
            yield value
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


def _first_line(error: duckdb.Error) -> str:
    return str(error).splitlines()[0]
