"""A raw ledger and its sidecar, side by side: blocks of images with the captions to choose from.

N images of a block, M captions of all of them, in the order of the sidecar.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.record import ShardRecord
from pipeline.sample import Origin, ShardError, Verdict
from pipeline.score_rows import CAPTIONS_SCHEMA

ROWS_PER_BLOCK = 5_000
SCORES = ("itm", "itc", "clip")
# In the order in which equals are listed.
ORIGINS = (Origin.HUMAN.value, Origin.WEB.value, Origin.SYNTHETIC.value)
HUMAN, WEB, SYNTHETIC = range(3)
RAW_COLUMNS = (
    "key",
    "source",
    "url",
    "verdict",
    "reason",
    "sha256",
    "width",
    "height",
    "original_width",
    "original_height",
    "extra",
)
MODELS = ("captioner", "filter", "clip_model")
SIDECAR_COLUMNS = (
    "key",
    "verdict",
    "reason",
    "origin",
    "index",
    "text",
    "num_tokens",
    "seed",
    *SCORES,
    *MODELS,
)


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions that may be chosen, M of them."""

    table: pa.Table  # (M,) the sidecar's columns; no text is null
    row: NDArray[np.int64]  # (M,) the image of each, ascending
    origin: NDArray[np.int8]  # (M,) index in ORIGINS
    is_refused: NDArray[np.bool_]  # (M,) by the scoring stage already; the table has its reason
    scores: dict[str, NDArray[np.float32]]  # (M,) by name, NaN where there is none

    def __len__(self) -> int:
        return len(self.row)

    def name(self, position: int) -> str:
        """Return what messages call a caption."""
        key, origin, index = (
            self.table[name][position].as_py() for name in ("key", "origin", "index")
        )
        return f"{key}, {origin} caption {index}"


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a raw ledger, and the captions of those that have an image."""

    rows: pa.Table  # (N,) RAW_COLUMNS; verdict and reason are the sidecar's where it lost the image
    captions: Captions


def read_blocks(
    raw: BinaryIO, sidecar: BinaryIO, captions: ShardRecord, num_rows: int
) -> Iterator[Block]:
    """Yield all rows of the raw ledger in order, in memory for one block at a time.

    Raises ShardError, naming the record of the sidecar, where the two do not tell of the same
    images.
    """
    try:
        scored = _Sidecar(sidecar)
        for rows in _batches(raw, RAW_COLUMNS, num_rows):
            yield _join(rows, scored.take_up_to(rows["key"][-1].as_py()), captions)
        if (left := scored.next_key()) is not None:
            _fail(captions, f"it has captions of {left}, which the raw shard has not")
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise ShardError(
            f"shard {captions.name}: its ledger or the raw one cannot be read ({error}); run "
            "`capfilt verify`"
        ) from error


def _batches(stream: BinaryIO, columns: tuple[str, ...], num_rows: int) -> Iterator[pa.Table]:
    with pq.ParquetFile(stream) as file:
        for batch in file.iter_batches(num_rows, columns=list(columns), use_threads=False):
            if batch.num_rows:
                yield pa.Table.from_batches([batch]).select(list(columns))


class _Sidecar:
    """The rows of a sidecar, handed out by key."""

    def __init__(self, stream: BinaryIO) -> None:
        self._batches = _batches(stream, SIDECAR_COLUMNS, 2 * ROWS_PER_BLOCK)
        self._held: pa.Table | None = next(self._batches, None)

    def next_key(self) -> str | None:
        """Return the key of the first row that was not taken."""
        return None if self._held is None else self._held["key"][0].as_py()

    def take_up_to(self, key: str) -> pa.Table | None:
        """Return the rows with this key and lower ones, or None where there are none."""
        parts = []
        while self._held is not None:
            count = pc.sum(pc.less_equal(self._held["key"], key)).as_py()
            parts.append(self._held.slice(0, count))
            if count < self._held.num_rows:
                self._held = self._held.slice(count)
                break
            self._held = next(self._batches, None)
        return pa.concat_tables(parts).combine_chunks() if parts else None


def _join(rows: pa.Table, scored: pa.Table | None, record: ShardRecord) -> Block:
    rows = rows.combine_chunks()
    expected = np.flatnonzero(_is_kept(rows))
    if scored is None or not scored.num_rows:
        if len(expected):
            _fail(record, f"it has nothing of {rows['key'][int(expected[0])].as_py()}")
        return Block(rows, _no_captions())
    first = _first_of_each(scored["key"].combine_chunks())
    found, wanted = scored["key"].take(first).to_pylist(), rows["key"].take(expected).to_pylist()
    if found != wanted:
        odd = min(set(found) ^ set(wanted), default=found[0])
        _fail(record, f"it and the raw shard differ in {odd}")
    image = expected[np.cumsum(np.isin(np.arange(scored.num_rows), first)) - 1]
    return _split(rows, scored, image, record)


def _split(
    rows: pa.Table, scored: pa.Table, image: NDArray[np.int64], record: ShardRecord
) -> Block:
    """Part what the sidecar says of whole images from what it says of captions."""
    is_of_image = _mask(pc.is_null(scored["origin"]))
    if (_is_kept(scored) & is_of_image).any():
        _fail(record, "it keeps an image of which it has no caption")
    lost = np.flatnonzero(is_of_image)
    if len(lost):
        for name in ("verdict", "reason"):
            values = np.array(rows[name].to_pylist(), dtype=object)
            values[image[lost]] = scored[name].take(lost).to_pylist()
            rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values))
    return Block(rows, _captions(scored.filter(pa.array(~is_of_image)), image[~is_of_image]))


def _captions(scored: pa.Table, image: NDArray[np.int64]) -> Captions:
    text = scored.schema.get_field_index("text")
    table = scored.set_column(text, "text", pc.fill_null(scored["text"], "")).combine_chunks()
    origin = pc.index_in(table["origin"], pa.array(ORIGINS))
    if origin.null_count:
        raise KeyError(f"an origin is none of {', '.join(ORIGINS)}")
    return Captions(
        table=table,
        row=image,
        origin=origin.to_numpy().astype(np.int8),
        is_refused=~_is_kept(table),
        scores={
            name: pc.fill_null(table[name], float("nan")).to_numpy().astype(np.float32)
            for name in SCORES
        },
    )


def _no_captions() -> Captions:
    empty = CAPTIONS_SCHEMA.empty_table().select(list(SIDECAR_COLUMNS))
    return _captions(empty, np.zeros(0, np.int64))


def _first_of_each(keys: pa.Array) -> NDArray[np.int64]:
    """Return where each run of equal keys begins."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.chunk(0)
    changes = _mask(pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)))
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def _is_kept(table: pa.Table) -> NDArray[np.bool_]:
    return _mask(pc.equal(table["verdict"], Verdict.KEPT.value))


def _mask(values: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)


def _fail(record: ShardRecord, problem: str) -> NoReturn:
    raise ShardError(
        f"shard {record.name}: {problem}; delete {record.name}.json and score the shard again"
    )
