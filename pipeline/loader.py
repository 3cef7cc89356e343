"""Training batches from a corpus's shards, in an order that no process can change.

    with Loader(corpus, LoaderConfig(global_batch_size=256), rank=rank, world_size=8) as loader:
        loader.load_state_dict(checkpoint["loader"])
        for batch in loader:  # without end
            pixels = loader.normalise(batch.pixels.to(device))

Step k of the optimizer sees the same samples whatever the world size, the micro-batches, the
workers, and the kills before it; the whole position is one number (see `loading.order`).
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from torch import Tensor

from pipeline.corpus import Corpus
from pipeline.loading.ahead import ShardsAhead
from pipeline.loading.batch import BatchFailure, BatchRequest, TrainingBatch
from pipeline.loading.cache import ShardCache
from pipeline.loading.config import LoaderConfig, LoaderError
from pipeline.loading.images import normalised
from pipeline.loading.index import read_index
from pipeline.loading.maker import BatchMaker
from pipeline.loading.order import Order
from pipeline.loading.stream import is_lost_worker, start_stream
from pipeline.loading.timing import LoaderTiming, WaitClock

__all__ = ["Loader", "LoaderConfig", "LoaderError", "LoaderTiming", "TrainingBatch"]

_log = logging.getLogger(__name__)
_LOUD_REPLACEMENTS = 10  # so many are told one by one; the counts go on

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class Loader(Iterator[TrainingBatch]):
    """The batches of one rank from a position onwards, without end.

    Workers start with the first batch and are started anew where the position is set.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        tokenize: Tokenize | None = None,
    ) -> None:
        """Raises LoaderError for a corpus with too little data or a batch that cannot be shared.

        `tokenize` gives each batch's token ids and which of them are real, both (B, T).
        """
        _check_share(config.global_batch_size, rank, world_size, micro_batches)
        self.config = config
        self.index = read_index(corpus, config)
        self.replaced: Counter[str] = Counter()
        self._rank, self._micro_batches = rank, micro_batches
        self._batch_size = config.global_batch_size // (world_size * micro_batches)
        self._tokenize = tokenize
        self._sizes = self.index.sizes(config)
        self._order = Order(self._sizes, seed=config.seed, group_shards=config.group_shards)
        cache = ShardCache(corpus, config.cache_folder, config.cache_bytes)
        self._ahead = ShardsAhead(self.index, cache, self._order, config)
        self._maker = BatchMaker(self.index, cache, config)
        self._step, self._micro_batch = 0, 0
        self._stream: Iterator[TrainingBatch | BatchFailure] | None = None
        self._clock = WaitClock()

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._step

    @property
    def batch_size(self) -> int:
        """Samples in each batch."""
        return self._batch_size

    def steps_before(self, epoch: int) -> int:
        """Return how many steps it takes until all samples of the epochs before this were seen."""
        return -(-self._order.epoch_start(epoch) // self.config.global_batch_size)

    def request(self, step: int, micro_batch: int = 0) -> BatchRequest:
        """Return which records this rank sees at a step."""
        first = step * self.config.global_batch_size
        share = self._rank * self._micro_batches + micro_batch
        start = first + share * self._batch_size
        refs = self._order.records(start, start + self._batch_size)
        return BatchRequest(step, micro_batch, self._order.epoch_of(first), refs)

    def __next__(self) -> TrainingBatch:
        """Return the next batch; blocks until it is there. Raises LoaderError."""
        with self._clock:
            batch = self._receive()
            assert (batch.step, batch.micro_batch) == (self._step, self._micro_batch)
            self._count(batch)
            if self._tokenize is not None:
                token_ids, is_real = self._tokenize(batch.texts)
                batch = replace(batch, token_ids=token_ids, text_is_real=is_real)
        self._micro_batch = (self._micro_batch + 1) % self._micro_batches
        self._step += self._micro_batch == 0
        return batch

    def __iter__(self) -> Self:
        return self

    def at(self, step: int) -> Self:
        """Set the position to the beginning of a step; return the loader."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        self._stop()
        self._step, self._micro_batch = step, 0
        return self

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last complete step, good for any number of ranks."""
        position = self._step * self.config.global_batch_size
        return {"step": self._step, "epoch": self._order.epoch_of(position), **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved position. Raises LoaderError if it is of another order than this one."""
        identity = self._identity()
        changed = [name for name in identity if state.get(name) != identity[name]]
        if changed:
            told = ", ".join(f"{n} {state.get(n)} then, {identity[n]} now" for n in changed)
            raise LoaderError(
                f"this position is of another order of samples: {told}. `data` stands for the "
                "clean shards and their shares: restore them and the settings, or train from the "
                "start"
            )
        self.at(state["step"])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return a batch's pixels as the model wants them, float32, on the device they are on."""
        return normalised(pixels, self.config.mean, self.config.std)

    def take_timing(self) -> LoaderTiming:
        """Return how long batches were waited for since this was last called.

        The first batch counts in neither time: it starts the workers.
        """
        return self._clock.take()

    def close(self) -> None:
        """Stop the workers. The position stays, and the loader may be used again."""
        self._stop()
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _identity(self) -> dict[str, int]:
        """Return what decides the order, as integers."""
        config = self.config
        return {
            "seed": config.seed,
            "global_batch_size": config.global_batch_size,
            "group_shards": config.group_shards,
            "data": self.index.fingerprint(self._sizes),
        }

    def _requests(self) -> Iterator[BatchRequest]:
        step = self._step
        while True:
            self._ahead.fetch(step)
            for micro_batch in range(self._micro_batches):
                yield self.request(step, micro_batch)
            step += 1

    def _receive(self) -> TrainingBatch:
        if self._stream is None:
            self._stream = start_stream(self._maker, self._requests, self.config)
        try:
            batch = next(self._stream)
        except (RuntimeError, EOFError, OSError) as error:
            if not is_lost_worker(error):
                raise
            self._stop()
            raise LoaderError(
                f"step {self._step}: a worker process of the loader died ({error}); if it was out "
                "of memory, lower num_workers, prefetch_batches or group_shards"
            ) from error
        if isinstance(batch, BatchFailure):
            self._stop()
            raise LoaderError(f"step {self._step}: {batch.message}")
        return batch

    def _count(self, batch: TrainingBatch) -> None:
        for each in batch.replacements:
            self.replaced[each.reason] += 1
            if self.replaced.total() <= _LOUD_REPLACEMENTS:
                _log.warning(
                    "rank %d, step %d, shard %s, sample %s: %s; sample %s stands in for it",
                    self._rank,
                    batch.step,
                    each.shard,
                    each.key,
                    each.message,
                    each.substitute,
                )

    def _stop(self) -> None:
        self._stream = None  # its workers end with it
        self._micro_batch = 0
        self._clock.stop()


def _check_share(global_batch_size: int, rank: int, world_size: int, micro_batches: int) -> None:
    if not 0 <= rank < world_size or micro_batches < 1:
        raise ValueError(f"rank {rank} of {world_size} with {micro_batches} micro-batches")
    if global_batch_size % (world_size * micro_batches):
        raise LoaderError(
            f"a global batch of {global_batch_size} cannot be shared equally by {world_size} ranks "
            f"with {micro_batches} micro-batches each; make it a multiple of "
            f"{world_size * micro_batches}"
        )
