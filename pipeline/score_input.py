"""A raw shard as what is to be scored: its kept rows, each with its sample or why there is none.

What was committed is hashed while it is read, so that a bit that flipped on a disk fails the shard
instead of changing a caption.
"""

import hashlib
import io
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus import Corpus
from pipeline.record import ShardRecord
from pipeline.sample import Origin, Sample, SampleError, ShardError, Verdict
from pipeline.tar import TarFault, TarSample, read_samples

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 1 << 20
_BATCH_ROWS = 1000
_COLUMNS = ["key", "source", "url", "verdict", "origin"]


@dataclass(frozen=True, slots=True)
class RawRow:
    """What a raw ledger says of an image that it kept."""

    key: str
    source: str
    url: str | None
    origin: Origin  # of the captions that its source gives


@dataclass(frozen=True, slots=True)
class RawImage:
    """A kept row and its sample; without one, the error says why."""

    row: RawRow
    sample: Sample | SampleError


class _Hashed(io.RawIOBase):
    """A stream that is hashed as it passes; it cannot seek, so that nothing goes by unhashed."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        self.sha256.update(data)
        view[: len(data)] = data
        return len(data)


def read_raw_shard(corpus: Corpus, record: ShardRecord) -> Generator[RawImage, None, None]:
    """Yield the kept rows of a raw shard in the tar's order, in memory for one sample at a time.

    Raises ShardError if the tar or the ledger is damaged, or one holds what the other does not;
    that may be after the last row, so nothing is to be committed before the iterator has ended.
    """
    rows = _kept_rows(corpus, record)
    faults: dict[str | None, TarFault] = {}

    def note(fault: TarFault) -> None:
        faults.setdefault(fault.key, fault)

    with corpus.open(record, "tar") as stream:
        hashed = _Hashed(stream)
        tar = io.BufferedReader(hashed, _CHUNK)
        for found in read_samples(tar, shard=record.name, on_fault=note):
            for row in rows:
                if row.key == found.key:
                    yield RawImage(row, _sample_of(found))
                    break
                yield RawImage(row, _why_absent(record, row, faults))
            else:
                raise _inconsistent(record, f"its ledger has not kept sample {found.key}")
        while tar.read(_CHUNK):
            pass
        _check_hash(record, "tar", hashed.sha256.hexdigest())
    for row in rows:
        yield RawImage(row, _why_absent(record, row, faults))


def _sample_of(found: TarSample) -> Sample | SampleError:
    try:
        return Sample.from_members(found.key, found.members)
    except SampleError as error:
        return error


def _why_absent(
    record: ShardRecord, row: RawRow, faults: dict[str | None, TarFault]
) -> SampleError:
    fault = faults.get(row.key)
    if fault is None:
        raise _inconsistent(record, f"its tar has no sample {row.key} where the ledger kept it")
    return SampleError(fault.reason, fault.message)


def _kept_rows(corpus: Corpus, record: ShardRecord) -> Iterator[RawRow]:
    with corpus.open(record, "parquet") as stream:
        data = stream.read()
    _check_hash(record, "parquet", hashlib.sha256(data).hexdigest())
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        for batch in file.iter_batches(_BATCH_ROWS, columns=_COLUMNS):
            for row in batch.to_pylist():
                if row["verdict"] == Verdict.KEPT:
                    origin = Origin(row["origin"] or Origin.WEB)
                    yield RawRow(row["key"], row["source"], row["url"], origin)
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise _inconsistent(record, f"its ledger cannot be read ({error})") from error


def _check_hash(record: ShardRecord, suffix: str, found: str) -> None:
    if found != record.files[suffix].sha256:
        raise _inconsistent(record, f"its {suffix} does not have the hash that was committed")


def _inconsistent(record: ShardRecord, problem: str) -> ShardError:
    return ShardError(
        f"shard {record.name}: {problem}; if it was not replaced meanwhile, delete "
        f"{record.name}.json and download it again"
    )
