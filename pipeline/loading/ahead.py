"""Shards of a remote corpus copied before they are read, so that no batch waits for a download."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.loading.cache import ShardCache
from pipeline.loading.config import LoaderConfig, LoaderError
from pipeline.loading.index import SampleIndex
from pipeline.loading.order import Order
from pipeline.record import ShardRecord

_log = logging.getLogger(__name__)
_NUM_COPIERS = 4
_SUFFIXES = ("parquet", "tar")
_GROUPS_AT_HAND = 2  # of each source: the one that is read and the next


class ShardsAhead:
    """Copies the groups of shards that are read now and next; does nothing for a local corpus."""

    def __init__(
        self, index: SampleIndex, cache: ShardCache, order: Order, config: LoaderConfig
    ) -> None:
        """Raises LoaderError without a cache, or with one that cannot hold what is read at once."""
        self._index, self._cache, self._order = index, cache, order
        self._batch_size = config.global_batch_size
        self._asked: set[tuple[int, int]] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._is_remote = not cache.corpus.store.is_local
        if self._is_remote:
            _check_room(index, cache, config)

    def fetch(self, step: int) -> None:
        """Begin to copy what this step reads, and the groups that come after it."""
        if not self._is_remote:
            return
        self._pool = self._pool or ThreadPoolExecutor(_NUM_COPIERS)
        start = step * self._batch_size
        groups = self._order.groups(start, start + self._batch_size)
        wanted = {(source, shard) for source, shards in groups for shard in shards}
        for source, shard in sorted(wanted - self._asked):
            record = self._index.sources[source].shards[shard]
            self._pool.submit(self._copy, record).add_done_callback(_tell)
        self._asked = wanted

    def close(self) -> None:
        """Stop copying, after the copies in the making."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._asked = None, set()

    def _copy(self, record: ShardRecord) -> None:
        for suffix in _SUFFIXES:
            self._cache.path(record, suffix)


def _tell(copied: Future[None]) -> None:
    """Log what went wrong; the worker that needs the shard meets it too, and stops."""
    if not copied.cancelled() and (error := copied.exception()) is not None:
        _log.warning("a shard could not be copied ahead of its use: %s", error)


def _check_room(index: SampleIndex, cache: ShardCache, config: LoaderConfig) -> None:
    if cache.folder is None:
        raise LoaderError(
            f"corpus {cache.corpus.root} is not on this machine; set cache_folder to a local "
            "folder for copies of its shards"
        )
    needed, largest = 0, 0
    for source in index.sources:
        sizes = sorted(
            (sum(shard.files[suffix].bytes for suffix in _SUFFIXES) for shard in source.shards),
            reverse=True,
        )
        needed += sum(sizes[: _GROUPS_AT_HAND * config.group_shards])
        largest = max(largest, *sizes)
    needed += (config.num_workers + _NUM_COPIERS) * largest
    if needed > config.cache_bytes:
        raise LoaderError(
            f"cache_bytes is {config.cache_bytes:,}, but two groups of {config.group_shards} "
            f"shards of each source and copies in the making may take {needed:,}; raise it, or "
            "lower group_shards"
        )
