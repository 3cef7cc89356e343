"""A batch from its request: find each record's bytes and texts, draw, decode, augment, stack.

Runs in worker processes and, without those, in the training process; the result is the same.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.image_decode import Pixels
from pipeline.loading.batch import BatchFailure, BatchRequest, Replacement, TrainingBatch
from pipeline.loading.cache import ShardCache
from pipeline.loading.config import LoaderConfig, LoaderError
from pipeline.loading.draws import draw
from pipeline.loading.images import NUM_DRAWS, training_image
from pipeline.loading.index import SampleIndex
from pipeline.loading.table import Record, ShardTable
from pipeline.loading.texts import draw_text
from pipeline.record import ShardRecord
from pipeline.sample import SampleError, ShardError

_log = logging.getLogger(__name__)
_MAX_SUBSTITUTES = 64  # bad records in a row: then it is the shard that is bad
_OPEN_TRIES = 5  # a file may be renamed by a commit, or its copy deleted, just before it is opened
_SPARE_SHARDS = 4  # kept open beyond the groups being read


class OpenShard:
    """A shard's records and the descriptor of its tar."""

    def __init__(self, record: ShardRecord, cache: ShardCache, index: SampleIndex) -> None:
        """Raises LoaderError or ShardError."""
        self.record = record
        self._descriptor = -1  # until it is open; `close` is called whatever happens
        self._descriptor = _open(cache, record, "tar")
        size, expected = os.fstat(self._descriptor).st_size, record.files["tar"].bytes
        if size != expected:
            raise LoaderError(
                f"shard {record.name}: {record.name}.tar has {size:,} bytes, not {expected:,}; "
                "`capfilt verify` says how to make it again"
            )
        with (
            os.fdopen(_open(cache, record, "parquet"), "rb") as ledger,
            os.fdopen(os.dup(self._descriptor), "rb") as tar,
        ):
            self.table = ShardTable(record, ledger, index.split, tar)

    def read(self, record: Record) -> bytes:
        """Return the bytes of a record's image. Raises SampleError where there are fewer."""
        data = os.pread(self._descriptor, record.num_bytes, record.offset)
        if len(data) < record.num_bytes:
            raise SampleError(
                "truncated_shard", f"the tar ends {record.num_bytes - len(data):,} bytes early"
            )
        return data

    def close(self) -> None:
        """Let go of the file. Safe to repeat."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Made:
    """One sample of a batch."""

    key: str
    image_id: int
    text: str
    pixels: Pixels


class BatchMaker(Dataset[TrainingBatch | BatchFailure]):
    """Makes batches; one for each process, with its own files open."""

    def __init__(self, index: SampleIndex, cache: ShardCache, config: LoaderConfig) -> None:
        self._index = index
        self._cache = cache
        self._config = config
        self._max_open = len(index.sources) * config.group_shards + _SPARE_SHARDS
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return self._index.num_records

    def __getitem__(self, request: BatchRequest) -> TrainingBatch | BatchFailure:
        """Return the batch, or why it cannot be: a worker's exceptions lose their own words."""
        try:
            return self.make(request)
        except (LoaderError, ShardError) as error:
            return BatchFailure(str(error))

    def make(self, request: BatchRequest) -> TrainingBatch:
        """Return the batch. Raises LoaderError or ShardError."""
        replacements: list[Replacement] = []
        made = [self._sample(*row, replacements) for row in request.refs.rows()]
        side = self._config.image_size
        pixels = torch.empty((len(made), side, side, 3), dtype=torch.uint8)
        np.stack([sample.pixels for sample in made], out=pixels.numpy())
        return TrainingBatch(
            step=request.step,
            micro_batch=request.micro_batch,
            epoch=request.epoch,
            pixels=pixels.permute(0, 3, 1, 2),  # (B, 3, S, S)
            texts=tuple(sample.text for sample in made),
            image_ids=torch.tensor([sample.image_id for sample in made]),
            keys=tuple(sample.key for sample in made),
            replacements=tuple(replacements),
        )

    def _sample(
        self, source: int, shard: int, number: int, visit: int, replacements: list[Replacement]
    ) -> _Made:
        """Return a sample, or of the records after it in its shard the first that is sound."""
        opened = self._shard(source, shard)
        name, faults = self._index.sources[source].name, []
        for step in range(min(len(opened.table), _MAX_SUBSTITUTES)):
            record = opened.table.record((number + step) % len(opened.table))
            try:
                made = self._made(name, opened, record, visit)
            except SampleError as error:
                faults.append((record.key, error))
            else:
                replacements += _told(opened.record, faults, record.key)
                return made
        raise LoaderError(
            f"shard {opened.record.name}: {len(faults)} records in a row cannot be used, the last "
            f"one {faults[-1][0]}: {faults[-1][1]}; `capfilt verify` says how to make it again"
        )

    def _made(self, source: str, opened: OpenShard, record: Record, visit: int) -> _Made:
        subject = (self._config.seed, source, record.key, record.first_text, visit)
        draws = draw(NUM_DRAWS + 1, "sample", *subject)
        text = draw_text(record.texts, draws[0], self._config)
        pixels = training_image(opened.read(record), self._config, draws[1:])
        return _Made(f"{source}/{record.key}", record.image_id, text, pixels)

    def _shard(self, source: int, shard: int) -> OpenShard:
        place = source, shard
        if place not in self._open:
            record = self._index.sources[source].shards[shard]
            self._open[place] = OpenShard(record, self._cache, self._index)
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(place)
        return self._open[place]


def _told(
    shard: ShardRecord, faults: Sequence[tuple[str, SampleError]], substitute: str
) -> list[Replacement]:
    return [
        Replacement(shard.name, key, error.reason, error.message, substitute)
        for key, error in faults
    ]


def _open(cache: ShardCache, record: ShardRecord, suffix: str) -> int:
    for _ in range(_OPEN_TRIES):
        try:
            return os.open(cache.path(record, suffix), os.O_RDONLY)
        except FileNotFoundError:
            _log.debug("%s.%s was moved as it was opened; trying again", record.name, suffix)
    raise LoaderError(
        f"shard {record.name}: {record.name}.{suffix} is moved each time it is opened; raise "
        "cache_bytes, or let other commands on this corpus end"
    )
