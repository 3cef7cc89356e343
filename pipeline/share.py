"""One corpus's shards in another, so that a second selection copies no images and asks no model.

    for stage in ("raw", "captions"):
        share_shard(Corpus("first"), Corpus("second"), stage, "laion", 42)

On one local disk the files are hard links, inside one object store they are copied by it, else they
pass through here. Committed files are never written to, only replaced by others, so neither corpus
can change the other's.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from pipeline import commit
from pipeline.corpus import Corpus
from pipeline.layout import UPSTREAM
from pipeline.record import ShardRecord
from pipeline.sample import ShardError

# What says that a disk has no hard links, none between these folders, or no more of them.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}


class Way(StrEnum):
    """How a file came into the other corpus."""

    PRESENT = "present"  # it was there
    LINKED = "linked"  # a hard link: the same bytes on disk, under a second name
    COPIED = "copied"  # by the storage itself
    STREAMED = "streamed"  # read here, its hash checked, and written there


@dataclass(frozen=True, slots=True)
class SharedFile:
    """One file of a shard and how it was shared."""

    name: str  # path below the root, once settled
    way: Way
    num_bytes: int


def share_upstream(
    corpus_from: Corpus, corpus_to: Corpus, source: str, index: int
) -> tuple[ShardRecord, ShardRecord, tuple[SharedFile, ...]]:
    """Return the raw shard and its sidecar as `corpus_to` now has them, and how they got there.

    Raises ShardError as `share_shard` does.
    """
    raw, files = share_shard(corpus_from, corpus_to, "raw", source, index)
    scored, more = share_shard(corpus_from, corpus_to, "captions", source, index)
    return raw, scored, files + more


def share_shard(
    corpus_from: Corpus, corpus_to: Corpus, stage: str, source: str, index: int
) -> tuple[ShardRecord, tuple[SharedFile, ...]]:
    """Return a shard that `corpus_to` now has from `corpus_from`, with the same record.

    Raises ShardError if there is no such shard, it is stale, or another one has its place; that one
    stays. It is committed as if it had been made there: whole or not at all, and safe to repeat.
    """
    record = corpus_from.record(stage, source, index)
    if record is None:
        raise ShardError(
            f"shard {stage}/{source}/{index:05d} is not in {corpus_from.root}; make it first"
        )
    if (above := UPSTREAM.get(stage)) is not None:
        made_from = corpus_from.record(above, source, index)
        if made_from is None or made_from.sha256 != record.inputs:
            raise ShardError(f"shard {record.name} is stale in {corpus_from.root}; make it again")
    existing = corpus_to.record(stage, source, index)
    if existing is not None:
        _check_same(existing, record, corpus_to)
        return existing, tuple(_present(record))
    folder = f"{stage}/{source}"
    corpus_to.store.make_folder(folder)
    with corpus_to.store.locked(folder):
        files = tuple(_place(corpus_from, corpus_to, record, suffix) for suffix in record.files)
        current = commit.publish(corpus_to.store, record, None)
        commit.settle(corpus_to.store, current)
    _check_same(current, record, corpus_to)
    for suffix in record.files:
        corpus_to.open(current, suffix).close()  # raises if a sweep elsewhere took it away
    return current, files


def _check_same(existing: ShardRecord, record: ShardRecord, corpus: Corpus) -> None:
    if existing.sha256 != record.sha256:
        raise ShardError(
            f"shard {record.name} is in {corpus.root} already and is another one; share with a "
            f"root that has no {record.stage}/{record.source}"
        )


def _present(record: ShardRecord) -> Iterator[SharedFile]:
    for suffix, file in record.files.items():
        yield SharedFile(f"{record.name}.{suffix}", Way.PRESENT, file.bytes)


def _place(corpus_from: Corpus, corpus_to: Corpus, record: ShardRecord, suffix: str) -> SharedFile:
    """Put one file under its staging name, where it is debris until the marker is there."""
    name, num_bytes = f"{record.name}.{suffix}", record.files[suffix].bytes
    if _link(corpus_from, corpus_to, record, suffix):
        return SharedFile(name, Way.LINKED, num_bytes)
    if _copy_in_place(corpus_from, corpus_to, record, suffix):
        return SharedFile(name, Way.COPIED, num_bytes)
    target = commit.staging_path(record, suffix)
    folder = f"{record.stage}/{record.source}"
    with corpus_to.store.scratch(folder, f"{record.index:05d}") as scratch:
        corpus_to.store.upload(corpus_from.local_copy(record, suffix, scratch), target)
    return SharedFile(name, Way.STREAMED, num_bytes)


def _link(corpus_from: Corpus, corpus_to: Corpus, record: ShardRecord, suffix: str) -> bool:
    """Link a file if both corpora are on one disk that can; say whether it is there now."""
    if not (corpus_from.store.is_local and corpus_to.store.is_local):
        return False
    original = corpus_from.local_path(record, suffix)
    assert original is not None, "the corpus is local"
    staged, final = (corpus_to.store.full(path) for path in commit.paths(record, suffix))
    # Renaming one link of a file to another link of it does nothing, and would leave both.
    if os.path.exists(final) and os.path.samefile(original, final):
        return True
    try:
        with suppress(FileExistsError):  # of an attempt that died; its name says what it holds
            os.link(original, staged)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    return True


def _copy_in_place(
    corpus_from: Corpus, corpus_to: Corpus, record: ShardRecord, suffix: str
) -> bool:
    """Have the storage copy a file if both corpora are in one that can; say whether it did."""
    fs = corpus_from.store.fs
    if corpus_to.store.is_local or fs != corpus_to.store.fs:
        return False
    target = corpus_to.store.full(commit.staging_path(record, suffix))
    for path in commit.paths(record, suffix):
        try:
            fs.cp_file(corpus_from.store.full(path), target)
        except FileNotFoundError:
            continue
        except NotImplementedError:
            return False
        return True
    raise ShardError(f"shard {record.name}: its {suffix} is missing in {corpus_from.root}")
