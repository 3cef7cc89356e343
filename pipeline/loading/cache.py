"""Local copies of a remote corpus's shards within a bound, shared by all processes of a machine.

Room is claimed before a copy is made, by a sparse file of its size that its maker keeps locked:
copies and claims are all the bookkeeping there is, and what a crash leaves behind is cleared by the
next claim. The least recently used copies are deleted; one that a process has open stays readable
there, and on the disk, until it is closed.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pipeline.corpus import Corpus
from pipeline.loading.config import LoaderError
from pipeline.record import ShardRecord

_CLAIM, _LOCK = ".claim", ".lock"
_COPIES = (".tar", ".parquet")  # the rest is claims and copies in the making


@dataclass(frozen=True, slots=True)
class ShardCache:
    """Gives the local path of any committed file: its own on a local disk, else a copy's."""

    corpus: Corpus
    folder: str | None
    max_bytes: int

    def path(self, record: ShardRecord, suffix: str) -> str:
        """Return the path, after copying the file if need be.

        Raises ShardError for a file that is missing or damaged, LoaderError without room for it. A
        path may vanish once other files are asked for: open it at once, or ask again.
        """
        own = self.corpus.local_path(record, suffix)
        if own is not None:
            return own
        assert self.folder is not None, "a remote corpus is not read without a cache"
        target = self.corpus.copy_path(record, suffix, self.folder)
        if not _touch(target):
            os.makedirs(self.folder, exist_ok=True)
            with _locked(target + _CLAIM) as claim:  # whoever wants the same file waits here
                if not _touch(target):
                    self._claim(claim, record.files[suffix].bytes, target)
                    self.corpus.local_copy(record, suffix, self.folder)
        return target

    def _claim(self, claim: int, num_bytes: int, target: str) -> None:
        """Delete until there is room for a file, then note on its claim that this is taken."""
        assert self.folder is not None
        with _locked(os.path.join(self.folder, _LOCK)):
            copies, used = _take_stock(self.folder)
            while copies and used + num_bytes > self.max_bytes:
                _, size, path = copies.pop(0)
                os.remove(path)
                used -= size
            if used + num_bytes > self.max_bytes:
                raise LoaderError(
                    f"{os.path.basename(target)} has {num_bytes:,} bytes, and copies in the making "
                    f"take {used:,} of the {self.max_bytes:,} that {self.folder} may hold; raise "
                    "cache_bytes"
                )
            os.ftruncate(claim, num_bytes)


def _take_stock(folder: str) -> tuple[list[tuple[int, int, str]], int]:
    """Return time of last use, size and path of each copy, oldest first, and the bytes in use.

    Removes the claims of dead processes and what they had copied so far.
    """
    copies, claimed, stale = [], {}, []
    for entry in os.scandir(folder):
        if entry.name.endswith(_CLAIM):
            if (size := _claimed_bytes(entry.path)) is not None:
                claimed[entry.path.removesuffix(_CLAIM)] = size
        elif entry.name.endswith(_COPIES):
            status = entry.stat()
            copies.append((status.st_mtime_ns, status.st_size, entry.path))
        elif entry.name != _LOCK:
            stale.append(entry.path)
    for path in stale:
        if path.rpartition(".")[0] not in claimed:
            os.remove(path)
    # A copy that has just been put in place is still claimed: it counts once, and stays.
    copies = [copy for copy in copies if copy[2] not in claimed]
    return sorted(copies), sum(size for _, size, _ in copies) + sum(claimed.values())


def _claimed_bytes(path: str) -> int | None:
    """Return what a claim takes, or None, and no such file, if its maker is gone."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(descriptor).st_size
        else:
            os.remove(path)
        finally:
            os.close(descriptor)
    return None


def _touch(path: str) -> bool:
    """Mark a copy as used now; False if there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """Hold a lock file that dies with the process, and give its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):  # else it was removed while this waited
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
