"""The ledgers of a corpus as SQL tables, read where they lie, within a fixed amount of memory.

A snapshot of the committed shards is taken once, so that a report of a running job is of one
moment. A stage that is not there yet is a table without rows.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import duckdb

from pipeline import commit
from pipeline.corpus import Corpus
from pipeline.layout import MARKER, STAGES, final_name
from pipeline.record import ShardRecord

Row = tuple[Any, ...]
_log = logging.getLogger(__name__)
_CAPTION = (
    "STRUCT(text VARCHAR, origin VARCHAR, index INTEGER, itm FLOAT, itc FLOAT, clip FLOAT, "
    "verdict VARCHAR, reason VARCHAR)[]"
)
_BASE = dict.fromkeys(("key", "source", "url", "verdict", "reason"), "VARCHAR")
# What the report reads of each ledger, as DuckDB calls the types.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "raw": {
        **_BASE,
        "caption": "VARCHAR",
        "origin": "VARCHAR",
        "http_status": "INTEGER",
        "attempts": "INTEGER",
        "final_url": "VARCHAR",
        "num_bytes": "BIGINT",
        "sha256": "VARCHAR",
        "phash": "VARCHAR",
        "width": "INTEGER",
        "height": "INTEGER",
        "original_width": "INTEGER",
        "original_height": "INTEGER",
        "extra": "VARCHAR",
    },
    "captions": {
        **_BASE,
        "origin": "VARCHAR",
        "index": "INTEGER",
        "text": "VARCHAR",
        "num_tokens": "INTEGER",
        "itm": "FLOAT",
        "itc": "FLOAT",
        "clip": "FLOAT",
        "captioner": "VARCHAR",
        "filter": "VARCHAR",
        "clip_model": "VARCHAR",
    },
    "clean": {
        **_BASE,
        "sha256": "VARCHAR",
        "width": "INTEGER",
        "height": "INTEGER",
        "num_captions": "INTEGER",
        "num_kept": "INTEGER",
        "captions": _CAPTION,
        "image_offset": "BIGINT",
        "image_bytes": "BIGINT",
        "policy": "VARCHAR",
    },
}


@dataclass(frozen=True, slots=True)
class Shard:
    """A committed shard, where its ledger is, and when it was committed (None if unknown)."""

    record: ShardRecord
    url: str
    committed_at: datetime | None


class ReportError(ValueError):
    """A corpus cannot be reported on as it is; the message says why and what to do."""


class CorpusChangedError(ReportError):
    """Shards were replaced while they were read."""


@dataclass(slots=True)
class Snapshot:
    """The shards of each stage at one moment, by source and index; what could not be read."""

    is_local: bool = False
    is_pinned: bool = False
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # markers, as paths below the root

    @classmethod
    def take(cls, corpus: Corpus) -> "Snapshot":
        """List a corpus; each source's folder is listed once for names and once for times."""
        snapshot = cls(is_local=corpus.store.is_local)
        for stage in STAGES:
            shards = snapshot.shards[stage] = []
            for source in corpus.sources(stage):
                folder = corpus.scan(stage, source)
                times = _marker_times(corpus, folder.path)
                for index in sorted(folder.damaged):
                    snapshot.damaged.append(f"{folder.path}/{final_name(index, MARKER)}")
                for index, record in sorted(folder.records.items()):
                    if "parquet" in record.files:
                        url = _url(corpus, _ledger_path(record, folder.sizes))
                        shards.append(Shard(record, url, times.get(final_name(index, MARKER))))
        return snapshot

    def pinned(self, folder: str) -> "Snapshot":
        """Return the snapshot with hard links in a local folder, which outlive any replacement.

        Where there can be none the snapshot itself. Raises CorpusChangedError if it is too late.
        """
        if not self.is_local:
            return self
        os.makedirs(folder, exist_ok=True)
        pinned = Snapshot(is_local=True, is_pinned=True, damaged=self.damaged)
        try:
            for stage, shards in self.shards.items():
                pinned.shards[stage] = [_link(shard, folder) for shard in shards]
        except FileNotFoundError as error:
            raise CorpusChangedError(str(error)) from error
        except OSError as error:
            _log.debug("no hard links in %s (%s); going on without", folder, error)
            return self
        return pinned

    def has_changed(self, corpus: Corpus) -> bool:
        """Say whether any of these shards has been replaced or removed since."""
        now = Snapshot.take(corpus)
        return any(
            {r.name: r.sha256 for r in self.records(stage)}.items()
            - {r.name: r.sha256 for r in now.records(stage)}.items()
            for stage in STAGES
        )

    def records(self, stage: str) -> list[ShardRecord]:
        """Return a stage's markers."""
        return [shard.record for shard in self.shards[stage]]


def _link(shard: Shard, folder: str) -> Shard:
    link = f"{folder}/{shard.record.name.replace('/', '-')}.parquet"
    os.link(shard.url, link)
    if os.path.getsize(link) != shard.record.files["parquet"].bytes:
        raise CorpusChangedError(f"{shard.record.name} was replaced while it was opened")
    return replace(shard, url=link)


def _ledger_path(record: ShardRecord, sizes: Mapping[str, int]) -> str:
    staged, final = commit.paths(record, "parquet")
    return staged if staged.rsplit("/", 1)[-1] in sizes else final


def _marker_times(corpus: Corpus, folder: str) -> dict[str, datetime]:
    """Return when each file of a folder was last written, as far as the filesystem says."""
    times = {}
    store = corpus.store
    for info in store.fs.ls(store.full(folder), detail=True):
        when = info.get("mtime") or info.get("LastModified") or info.get("created")
        if isinstance(when, int | float):
            when = datetime.fromtimestamp(when, UTC)
        if isinstance(when, datetime):
            aware = when if when.tzinfo else when.replace(tzinfo=UTC)
            times[info["name"].rsplit("/", 1)[-1]] = aware.astimezone(UTC)
    return times


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlLimits:
    """What the SQL engine may use; beyond its memory it spills to a temporary folder."""

    memory_mib: int = 2048
    threads: int = 2


class Ledgers:
    """SQL over the three ledgers: tables `raw`, `captions` and `clean`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> None:
        self._connection = connection
        self.snapshot = snapshot

    @classmethod
    @contextmanager
    def open(
        cls, corpus: Corpus, snapshot: Snapshot, limits: SqlLimits | None = None
    ) -> Iterator["Ledgers"]:
        """Give the tables of a snapshot; what was spilled is removed afterwards."""
        limits = limits or SqlLimits()
        with tempfile.TemporaryDirectory(prefix="capfilt-report-") as spill:
            config: dict[str, str | bool | int | float | list[str]] = {
                "memory_limit": f"{limits.memory_mib}MiB",
                "threads": limits.threads,
                "temp_directory": spill,
                "preserve_insertion_order": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            }
            with duckdb.connect(":memory:", config=config) as connection:
                connection.execute("SET parquet_metadata_cache = true")
                ledgers = cls(connection, snapshot)
                ledgers.register(corpus)
                for stage, shards in snapshot.shards.items():
                    ledgers.add_table(stage, stage, [shard.url for shard in shards])
                yield ledgers

    def register(self, corpus: Corpus) -> None:
        """Make a corpus's storage known to the SQL engine, unless it is a local disk."""
        if not corpus.store.is_local:
            self._connection.register_filesystem(corpus.store.fs)

    def add_table(self, name: str, stage: str, urls: Sequence[str]) -> None:
        """Make ledgers of a stage a table of its own; a column that they lack is null."""
        if not urls:
            columns = ", ".join(f'"{column}" {kind}' for column, kind in COLUMNS[stage].items())
            self._connection.execute(f"CREATE TABLE {name} ({columns})")
            return
        files = self._connection.read_parquet([_without_glob(url) for url in urls])
        there = set(files.columns)
        chosen = [
            f'"{column}"' if column in there else f'NULL::{kind} AS "{column}"'
            for column, kind in COLUMNS[stage].items()
        ]
        files.project(", ".join(chosen)).create_view(name)

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[Row]:
        """Return all rows of a query, which is to give few."""
        return self._connection.execute(sql, list(parameters)).fetchall()

    def row(self, sql: str, parameters: Sequence[object] = ()) -> Row:
        """Return the one row of a query that aggregates."""
        (row,) = self.rows(sql, parameters)
        return row

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> None:
        """Run a statement, such as one that makes a temporary table."""
        self._connection.execute(sql, list(parameters))


def _url(corpus: Corpus, path: str) -> str:
    """Return where a path below the root is, as the SQL engine opens it."""
    full = corpus.store.full(path)
    return full if corpus.store.is_local else str(corpus.store.fs.unstrip_protocol(full))


def _without_glob(path: str) -> str:
    """Return a path that stands for itself where patterns are understood."""
    return "".join(f"[{char}]" if char in "[*?" else char for char in path)
