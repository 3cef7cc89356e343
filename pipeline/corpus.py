"""The corpus on disk: which shards exist, how to read and write them, and what a crash left over.

`<root>/<stage>/<source>/00042.tar|.parquet|.json` on any fsspec filesystem. A shard exists exactly
while its marker, the `.json`, is there and whole.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, BinaryIO
from uuid import uuid4

from pipeline import commit, runfile
from pipeline.layout import (
    MARKER,
    RUN_FILE,
    STAGES,
    check_shard,
    final_name,
    is_source,
    is_temporary,
    parse_name,
)
from pipeline.record import RecordError, ShardRecord
from pipeline.sample import ShardError
from pipeline.store import Store

_log = logging.getLogger(__name__)
_NUM_READERS = 16
_CHUNK = 1 << 20


@dataclass(slots=True)
class Folder:
    """What one listing of a source's folder shows."""

    path: str
    sizes: dict[str, int]  # of every file, by name
    temporaries: list[str]  # folders that writers have not finished with
    records: dict[int, ShardRecord] = field(default_factory=dict)
    damaged: dict[int, str] = field(default_factory=dict)  # markers that are not whole, and why

    def leftovers(self) -> Iterator[str]:
        """Yield the files that belong to no shard; those of a damaged marker are spared."""
        for name in self.sizes:
            parsed = parse_name(name)
            if parsed is None:
                if is_temporary(name):
                    yield name
                continue
            if parsed.index in self.damaged or (parsed.suffix == MARKER and not parsed.digest):
                continue
            record = self.records.get(parsed.index)
            file = record.files.get(parsed.suffix) if record else None
            if file is None or (parsed.digest and parsed.digest != file.sha256[:16]):
                yield name

    def strangers(self) -> Iterator[str]:
        """Yield the files that are not named like any of ours."""
        for name in self.sizes:
            if parse_name(name) is None and not is_temporary(name):
                yield name

    def unsettled(self) -> Iterator[ShardRecord]:
        """Yield the shards with a file that still has its staging name."""
        for record in self.records.values():
            staged = (commit.staging_path(record, suffix) for suffix in record.files)
            if any(path.rsplit("/", 1)[-1] in self.sizes for path in staged):
                yield record


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did, as paths below the root."""

    removed: tuple[str, ...]
    settled: tuple[str, ...]


class Corpus:
    """A corpus under a root URL. Any number of processes may read and write it at once."""

    def __init__(self, root: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.store = Store(root, storage_options)

    @property
    def root(self) -> str:
        """The root's absolute URL; for a local disk, its absolute path."""
        return self.store.url

    def sources(self, stage: str) -> list[str]:
        """Return the sources that a stage has a folder for, sorted."""
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
        return sorted(name for name in self.store.list(stage).folders if is_source(name))

    def shards(self, stage: str, source: str | None = None) -> list[ShardRecord]:
        """Return the shards that exist, by source and index, from one listing of each folder.

        A marker that is damaged counts as absent, with a warning.
        """
        records = []
        for name in self.sources(stage) if source is None else [source]:
            folder = self.scan(stage, name)
            for index, problem in folder.damaged.items():
                _log.warning(
                    "%s/%s is passed over: %s; `capfilt verify` says what to do",
                    folder.path,
                    final_name(index, MARKER),
                    problem,
                )
            records += [folder.records[index] for index in sorted(folder.records)]
        return records

    def record(self, stage: str, source: str, index: int) -> ShardRecord | None:
        """Return one shard, or None if it does not exist; reads its marker and nothing else."""
        check_shard(stage, source, index)
        path = f"{stage}/{source}/{final_name(index, MARKER)}"
        try:
            return self._read_marker(stage, source, index)
        except RecordError as error:
            _log.warning("%s is passed over: %s", path, error)
            return None

    def scan(self, stage: str, source: str) -> Folder:
        """Return all that is in a source's folder, with its markers read."""
        check_shard(stage, source)
        path = f"{stage}/{source}"
        listing = self.store.list(path)
        folder = Folder(path, listing.sizes, [n for n in listing.folders if is_temporary(n)])
        names = [parse_name(name) for name in folder.sizes]
        indexes = [n.index for n in names if n and n.suffix == MARKER and not n.digest]

        def read(index: int) -> None:
            try:
                record = self._read_marker(stage, source, index)
            except RecordError as error:
                folder.damaged[index] = str(error)
            else:
                if record is not None:
                    folder.records[index] = record

        if self.store.is_local:  # nothing to wait for, so threads only cost
            for index in indexes:
                read(index)
            return folder
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            list(pool.map(read, indexes))  # raises what a reader raised
        return folder

    def _read_marker(self, stage: str, source: str, index: int) -> ShardRecord | None:
        data = self.store.read(f"{stage}/{source}/{final_name(index, MARKER)}")
        if data is None:
            return None
        record = ShardRecord.from_bytes(data)
        if (record.stage, record.source, record.index) != (stage, source, index):
            raise RecordError(f"it is the marker of {record.name}")
        return record

    @contextmanager
    def writer(
        self,
        stage: str,
        source: str,
        index: int,
        *,
        fingerprint: str,
        inputs: str | None = None,
        replace: ShardRecord | None = None,
    ) -> Iterator[commit.ShardWriter]:
        """Give a writer for one attempt at a shard.

        `inputs` is the sha256 of the record of the shard it is made from. `replace` is the existing
        shard that this attempt is to take the place of; without it an existing one is left as it is
        and returned by `commit`.
        """
        check_shard(stage, source, index)
        making = commit.Making(
            stage=stage,
            source=source,
            index=index,
            fingerprint=fingerprint,
            inputs=inputs,
            replace=replace,
        )
        with commit.ShardWriter(self.store, making) as writer:
            yield writer

    def open(self, record: ShardRecord, suffix: str) -> BinaryIO:
        """Open a committed file for reading, binary and seekable.

        Checks its size but not its hash; `local_copy` checks both. Raises ShardError.
        """
        expected = commit.file_of(record, suffix).bytes
        for path in commit.paths(record, suffix):
            try:
                stream = self.store.open(path)
            except FileNotFoundError:
                continue
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            if size == expected:
                return stream
            stream.close()
            raise _changed(record, suffix, f"has {size:,} bytes, not {expected:,}")
        raise _changed(record, suffix, "is missing")

    def local_path(self, record: ShardRecord, suffix: str) -> str | None:
        """Return a committed file's own path if the corpus is on a local disk, else None."""
        if not self.store.is_local:
            return None
        for path in commit.paths(record, suffix):
            if os.path.exists(self.store.full(path)):
                return self.store.full(path)
        raise _changed(record, suffix, "is missing")

    def copy_path(self, record: ShardRecord, suffix: str, folder: str) -> str:
        """Return where `local_copy` puts a file; the name tells its content too."""
        digest = commit.file_of(record, suffix).sha256[:16]
        return os.path.join(folder, f"{record.name.replace('/', '-')}.{digest}.{suffix}")

    def local_copy(self, record: ShardRecord, suffix: str, folder: str) -> str:
        """Return the path of a copy in a local folder, made and its hash checked if not yet there.

        Raises ShardError. Safe to call from many processes for the same file.
        """
        file = commit.file_of(record, suffix)
        target = self.copy_path(record, suffix, folder)
        if os.path.exists(target) and os.path.getsize(target) == file.bytes:
            return target
        os.makedirs(folder, exist_ok=True)
        temporary, digest = f"{target}.{uuid4().hex}", sha256()
        try:
            with self.open(record, suffix) as stream, open(temporary, "wb") as copy:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    copy.write(chunk)
            if digest.hexdigest() != file.sha256:
                raise _changed(record, suffix, "does not have the hash that was committed")
            os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
        return target

    def sweep(self, stage: str | None = None) -> Swept:
        """Remove what crashes left over and finish what they interrupted; shards stay as they are.

        Meant for the start and end of a run. A commit that is under way is not harmed, nor is an
        attempt that is still making its files, on disks that have locks; elsewhere it has to start
        again. Nothing is removed where a marker is damaged, nor is any file that is not named like
        one of ours.
        """
        removed: list[str] = []
        settled: list[str] = []
        for each in STAGES if stage is None else [stage]:
            for source in self.sources(each):
                with self.store.locked(f"{each}/{source}"):
                    self._sweep_folder(self.scan(each, source), removed, settled)
        for name in filter(is_temporary, self.store.list("").sizes):
            self.store.remove(name)
            removed.append(name)
        return Swept(tuple(removed), tuple(settled))

    def _sweep_folder(self, folder: Folder, removed: list[str], settled: list[str]) -> None:
        for record in folder.unsettled():
            commit.settle(self.store, record)
            settled.append(record.name)
        for name in folder.leftovers():
            self.store.remove(f"{folder.path}/{name}")
            removed.append(f"{folder.path}/{name}")
        for name in folder.temporaries:
            if self.store.remove_folder(f"{folder.path}/{name}"):
                removed.append(f"{folder.path}/{name}")

    def write_run(self, text: str) -> str:
        """Store the run's description as run.yaml, unless there is one; return what is in force.

        The caller compares that with its own (see `runfile.check_same`). Raises RunFileError if the
        one that is there is damaged.
        """
        self.store.make_folder("")
        self.store.create(RUN_FILE, runfile.seal(text))
        stored = self.read_run()
        assert stored is not None, "run.yaml was just written"
        return stored

    def read_run(self) -> str | None:
        """Return the description in run.yaml, or None before the first run. Raises RunFileError."""
        data = self.store.read(RUN_FILE)
        return None if data is None else runfile.unseal(data)


def _changed(record: ShardRecord, suffix: str, problem: str) -> ShardError:
    return ShardError(
        f"shard {record.name}: {record.name}.{suffix} {problem}; if it was not replaced meanwhile, "
        f"delete {record.name}.{MARKER} and run again"
    )
