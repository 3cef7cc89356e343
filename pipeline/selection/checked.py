"""Committed files read with their hashes: a bit that flipped on a disk fails the shard."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pipeline.corpus import Corpus
from pipeline.record import ShardRecord
from pipeline.sample import ShardError
from pipeline.store import hash_stream

_CHUNK = 1 << 20


@contextmanager
def open_checked(
    corpus: Corpus, record: ShardRecord, suffix: str, folder: str
) -> Iterator[BinaryIO]:
    """Give a committed file whose hash has been checked, seekable; from afar, a copy in `folder`.

    Raises ShardError.
    """
    if corpus.store.is_local:
        with corpus.open(record, suffix) as stream:
            if hash_stream(stream) != record.files[suffix].sha256:
                raise _damaged(record, suffix)
            stream.seek(0)
            yield stream
    else:
        with open(corpus.local_copy(record, suffix, folder), "rb") as stream:
            yield stream


class HashedStream(io.RawIOBase):
    """A file that is read once and in order, and hashed as it passes."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        """Say that it can be read; it cannot seek, so that nothing goes by unhashed."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read what fits into the buffer."""
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        self._sha256.update(data)
        view[: len(data)] = data
        return len(data)

    def check(self, record: ShardRecord, suffix: str) -> None:
        """Read what is left. Raises ShardError if all of it is not what was committed."""
        while data := self._stream.read(_CHUNK):
            self._sha256.update(data)
        if self._sha256.hexdigest() != record.files[suffix].sha256:
            raise _damaged(record, suffix)


def _damaged(record: ShardRecord, suffix: str) -> ShardError:
    return ShardError(
        f"shard {record.name}: its {suffix} does not have the hash that was committed; if it was "
        f"not replaced meanwhile, delete {record.name}.json and make the shard again"
    )
