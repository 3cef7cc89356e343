"""How a shard comes to exist: files first under names of their content, then the marker, at once.

1. The files are made in a local scratch folder and hashed.
2. Each is put under a staging name, `00042.tar.<16 digits of its hash>`. Until the next step all
   of this is debris, and a shard that is being replaced is untouched.
3. The marker is put in one atomic operation: this is the commit. A first commit creates it, so of
   two racing attempts one wins whole; a replacement swaps it for the one it was told to replace.
4. Staging names become final ones, `00042.tar`. Anyone may do that, any number of times.

Readers take the staging name of the marker's hash if it is there, else the final name, so they see
the committed content between any two of these steps.
"""

import logging
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from pipeline.layout import MARKER, check_suffix, final_name, staging_name
from pipeline.record import Counts, FileRecord, RecordError, ShardRecord
from pipeline.sample import ShardError
from pipeline.store import Store, hash_stream

_log = logging.getLogger(__name__)
_MAX_ROUNDS = 10  # how often a marker may change under one commit


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """Which shard is made, by what, and from what."""

    stage: str
    source: str
    index: int
    fingerprint: str
    inputs: str | None = None  # the sha256 of the upstream shard's record
    replace: ShardRecord | None = None

    @property
    def folder(self) -> str:
        """The path of the shard's folder below the root."""
        return f"{self.stage}/{self.source}"


class ShardWriter:
    """Collects a shard's files and commits them; leaving it without `commit` leaves no shard."""

    def __init__(self, store: Store, making: Making) -> None:
        self._store = store
        self._making = making
        self._paths: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._store.make_folder(self._making.folder)
        self._scratch = self._store.scratch(self._making.folder, f"{self._making.index:05d}")
        self._folder = self._scratch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scratch.__exit__(kind, error, traceback)

    @property
    def folder(self) -> str:
        """A local folder that is emptied afterwards; what is left in it is not committed."""
        return self._folder

    def path(self, suffix: str) -> str:
        """Return the local path at which to write the file with this suffix, such as "tar"."""
        check_suffix(suffix)
        return self._paths.setdefault(suffix, f"{self._folder}/{suffix}")

    def commit(
        self, *, rows_in: int, counts: Counts, stats: dict[str, Any] | None = None
    ) -> ShardRecord:
        """Commit every file that `path` was asked for; return the shard that now exists.

        That is another attempt's shard if it came first. The files are gone from the scratch
        folder. Raises ValueError if the counts do not add up to `rows_in`, and FileNotFoundError
        for a file that was not written. Safe to repeat in a new writer after any failure.
        """
        making = self._making
        record = ShardRecord(
            stage=making.stage,
            source=making.source,
            index=making.index,
            rows_in=rows_in,
            counts=counts,
            stats=stats or {},
            fingerprint=making.fingerprint,
            inputs=making.inputs,
            files={suffix: _describe(path) for suffix, path in sorted(self._paths.items())},
        ).sealed()
        with self._store.locked(making.folder):
            return self._commit(record)

    def _commit(self, record: ShardRecord) -> ShardRecord:
        replaced = self._making.replace
        if replaced is not None:
            # So that nobody who is late settles it over this one.
            settle(self._store, replaced)
        staged = [suffix for suffix in record.files if not self._is_there(record, suffix)]
        for suffix in staged:
            self._stage(record, suffix)
        current = publish(self._store, record, replaced)
        if current != record:
            self._withdraw(record, current)
        unsettled = settle(self._store, current)
        if current == record:
            self._make_sure(record, [suffix for suffix in unsettled if suffix in staged])
            for suffix in replaced.files.keys() - record.files.keys() if replaced else ():
                self._store.remove(_final(record, suffix))
        return current

    def _is_there(self, record: ShardRecord, suffix: str) -> bool:
        """Say whether the shard to replace has the same file already, and undamaged.

        Its staging name is then left alone: readers would prefer it to the final one even while it
        is being written, where a filesystem does that in steps.
        """
        replaced, file = self._making.replace, record.files[suffix]
        if replaced is None or replaced.files.get(suffix) != file:
            return False
        return self._store.sha256(_final(record, suffix)) == file.sha256

    def _stage(self, record: ShardRecord, suffix: str) -> None:
        self._store.upload(self._paths[suffix], staging_path(record, suffix))

    def _withdraw(self, record: ShardRecord, winner: ShardRecord) -> None:
        _log.info("shard %s: another attempt committed first; using that", record.name)
        for suffix, file in record.files.items():
            if winner.files.get(suffix) != file:
                self._store.remove(staging_path(record, suffix))

    def _make_sure(self, record: ShardRecord, suffixes: list[str]) -> None:
        """Look after files that had no staging name any more when the marker was there.

        Most likely someone else has settled them. A sweep that ran between staging and the marker
        has removed them instead.
        """
        for suffix in suffixes:
            if self._store.sha256(_final(record, suffix)) == record.files[suffix].sha256:
                continue
            if not os.path.exists(self._paths[suffix]):
                raise ShardError(
                    f"shard {record.name}: {suffix} was removed while it was committed; "
                    f"delete {record.name}.{MARKER} and run again"
                )
            self._stage(record, suffix)
            settle(self._store, record)


def _describe(path: str) -> FileRecord:
    with open(path, "rb") as stream:
        return FileRecord(bytes=os.path.getsize(path), sha256=hash_stream(stream))


def staging_path(record: ShardRecord, suffix: str) -> str:
    """Return the path, below the root, that a committed file has until it is settled."""
    name = staging_name(record.index, suffix, record.files[suffix].sha256)
    return f"{record.stage}/{record.source}/{name}"


def _final(record: ShardRecord, suffix: str) -> str:
    return f"{record.stage}/{record.source}/{final_name(record.index, suffix)}"


def file_of(record: ShardRecord, suffix: str) -> FileRecord:
    """Return what a shard's file holds. Raises ValueError if the shard has no such file."""
    if suffix not in record.files:
        raise ValueError(f"shard {record.name} has no {suffix}, only {', '.join(record.files)}")
    return record.files[suffix]


def paths(record: ShardRecord, suffix: str) -> tuple[str, str]:
    """Return where a committed file may be, below the root: the first of these that exists."""
    file_of(record, suffix)
    return staging_path(record, suffix), _final(record, suffix)


def settle(store: Store, record: ShardRecord) -> list[str]:
    """Give a committed shard's files their final names; return those that had no staging name."""
    return [
        suffix
        for suffix in record.files
        if not store.move(staging_path(record, suffix), _final(record, suffix))
    ]


def publish(store: Store, record: ShardRecord, replaced: ShardRecord | None) -> ShardRecord:
    """Put the marker if the shard is absent, damaged, or the one to replace; return what is there.

    The record's files must be staged.
    """
    path, data = f"{record.name}.{MARKER}", record.to_bytes()
    for _ in range(_MAX_ROUNDS):
        found = store.read(path)
        if found is None:
            if store.create(path, data):
                return record
            continue
        try:
            current = ShardRecord.from_bytes(found)
        except RecordError as error:
            _log.warning("%s is replaced: %s", path, error)
        else:
            if replaced is None or current.sha256 != replaced.sha256:
                return current
        if store.swap(path, found, data):
            return record
    raise ShardError(f"shard {record.name}: its marker keeps changing; stop the other run first")
