"""The trainable records of one shard, read from its ledger: where images lie, which texts.

A *record* is what a batch is made of. An image of the web is one record, whichever of its kept
captions is drawn for it; an annotated image is one record for each of its human captions (BLIP-2
counts COCO as 567k pairs of 113k images).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.loading.config import LoaderError
from pipeline.loading.draws import hash63
from pipeline.loading.raw import RAW_COLUMNS, raw_table
from pipeline.record import ShardRecord
from pipeline.sample import Origin, Verdict

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_ID_DIGITS = 16  # of the image's SHA-256 in hexadecimal
_CAPTION = "captions.list.element."
_COUNTED = ("key", "sha256", "verdict", "image_bytes", f"{_CAPTION}origin", f"{_CAPTION}verdict")
_LOADED = (*_COUNTED, "image_offset", f"{_CAPTION}text")


@dataclass(frozen=True, slots=True)
class Split:
    """Which images are read: those that a hash puts below a fraction, or the others."""

    fraction: float
    is_holdout: bool

    def holds(self, image_ids: Integers) -> Flags:
        """Say of each image whether it is on this side, (N,) bool."""
        return np.equal(image_ids < int(self.fraction * 2**63), self.is_holdout)


@dataclass(frozen=True, slots=True)
class Record:
    """One record: an image's place in the shard's tar, and the texts to draw from."""

    key: str
    image_id: int  # the same for the same bytes, whatever the source
    offset: int
    num_bytes: int
    texts: tuple[str, ...]
    first_text: int  # its number among the shard's texts, which tells records of an image apart


@dataclass(frozen=True, slots=True)
class _Rows:
    """Records as numbers, and what they were made from."""

    table: pa.Table
    is_used: Flags  # of each of the shard's captions
    row: Integers  # of each record, in the ledger
    start: Integers  # of each record's texts among the used captions, and the end of the last
    image_ids: Integers  # of each row


class ShardTable:
    """The records of one shard."""

    def __init__(
        self, record: ShardRecord, file: str | BinaryIO, split: Split, tar: BinaryIO
    ) -> None:
        """Raises LoaderError for a ledger that cannot be read or is not of its stage."""
        rows = _records(_read(record, file, _LOADED, tar), record.source, split)
        self._row, self._start = rows.row, rows.start
        # As Python's own: Arrow takes longer for one value than a list does for a hundred.
        self._keys: list[str] = rows.table["key"].to_pylist()
        self._image_ids = rows.image_ids
        self._offsets = _integers(rows.table["image_offset"])
        self._num_bytes = _integers(rows.table["image_bytes"])
        texts = _captions(rows.table).flatten().field("text")
        self._texts: list[str] = texts.filter(pa.array(rows.is_used)).to_pylist()

    def __len__(self) -> int:
        return len(self._row)

    def record(self, number: int) -> Record:
        """Return one record by its number."""
        row, start, stop = (int(n) for n in (self._row[number], *self._start[number : number + 2]))
        return Record(
            key=self._keys[row],
            image_id=int(self._image_ids[row]),
            offset=int(self._offsets[row]),
            num_bytes=int(self._num_bytes[row]),
            texts=tuple(self._texts[start:stop]),
            first_text=start,
        )


def count_records(record: ShardRecord, file: str | BinaryIO, split: Split) -> int:
    """Return how many records a shard has, without reading its texts. Raises LoaderError."""
    return len(_records(_read(record, file, _COUNTED, None), record.source, split).row)


def _read(
    record: ShardRecord, file: str | BinaryIO, columns: Sequence[str], tar: BinaryIO | None
) -> pa.Table:
    if record.stage == "raw":
        return raw_table(record, _columns(record, file, RAW_COLUMNS), tar)
    return _columns(record, file, columns)


def _columns(record: ShardRecord, file: str | BinaryIO, columns: Sequence[str]) -> pa.Table:
    try:
        ledger = pq.ParquetFile(file)
        missing = [name for name in columns if not _has(ledger.schema_arrow, name)]
        if missing:
            raise LoaderError(
                f"shard {record.name}: its ledger {record.name}.parquet lacks "
                f"{', '.join(missing)}; it was not written by this version. Make the shard "
                "again for this corpus"
            )
        return ledger.read(columns=list(columns))
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise LoaderError(
            f"shard {record.name}: its ledger {record.name}.parquet cannot be read ({error}); "
            "`capfilt verify` says what is damaged and how to make it again"
        ) from error


def _has(schema: pa.Schema, column: str) -> bool:
    if not column.startswith(_CAPTION):
        return column in schema.names
    if "captions" not in schema.names:
        return False
    kind = schema.field("captions").type
    inner = column.removeprefix(_CAPTION)
    is_structs = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
    return bool(is_structs and kind.value_type.get_field_index(inner) >= 0)


def _records(table: pa.Table, source: str, split: Split) -> _Rows:
    """Return the records of the rows that are kept, have an image, a kept text and are in split."""
    image_ids = _image_ids(table, source)
    is_kept = _equals(table["verdict"], Verdict.KEPT) & (_integers(table["image_bytes"]) > 0)
    is_kept &= split.holds(image_ids)
    captions = _captions(table)
    parent = pc.list_parent_indices(captions).to_numpy()
    flat = captions.flatten()
    is_human = _equals(flat.field("origin"), Origin.HUMAN)
    is_used = _equals(flat.field("verdict"), Verdict.KEPT) & is_kept[parent]
    has_human = np.zeros(len(table), dtype=bool)
    has_human[parent[is_used & is_human]] = True
    is_used &= is_human | ~has_human[parent]
    rows, human = parent[is_used], is_human[is_used]
    is_first = human.copy()
    is_first[:1] = True
    is_first[1:] |= rows[1:] != rows[:-1]
    start = np.flatnonzero(is_first)
    return _Rows(table, is_used, rows[start], np.append(start, len(rows)), image_ids)


def _image_ids(table: pa.Table, source: str) -> Integers:
    """Return a number in [0, 2**63) for each image: of its bytes, or of its name without a hash."""
    hashes, keys = table["sha256"].to_pylist(), table["key"].to_pylist()
    return np.array(
        [
            int(digest[:_ID_DIGITS], 16) >> 1 if digest else hash63("image", source, key)
            for digest, key in zip(hashes, keys, strict=True)
        ],
        dtype=np.int64,
    )


def _captions(table: pa.Table) -> pa.Array:
    return table["captions"].combine_chunks()


def _equals(column: pa.Array, value: str) -> Flags:
    flags = pc.fill_null(pc.equal(column, pa.scalar(str(value))), False)
    return np.asarray(flags.to_numpy(zero_copy_only=False), dtype=bool)


def _integers(column: pa.Array) -> Integers:
    numbers = pc.fill_null(pc.cast(column, pa.int64()), 0)
    return np.asarray(numbers.to_numpy(), dtype=np.int64)
