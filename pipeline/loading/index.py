"""Which shards there are to train on, and how many records each holds."""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

from pipeline.corpus import Corpus
from pipeline.loading.config import LoaderConfig, LoaderError, SourceConfig, exact
from pipeline.loading.draws import hash63
from pipeline.loading.order import SourceSize
from pipeline.loading.table import Split, count_records
from pipeline.record import ShardRecord
from pipeline.sample import ShardError

_log = logging.getLogger(__name__)
_MAKES = {"clean": "run the selection (`capfilt run`)", "raw": "download it (`capfilt download`)"}
_NUM_READERS = 16


@dataclass(frozen=True, slots=True)
class SourceShards:
    """A source's shards by index, and how many records each holds."""

    name: str
    shards: tuple[ShardRecord, ...]
    counts: tuple[int, ...]

    @property
    def num_records(self) -> int:
        """The records of all shards."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """All that a stage trains on, sources by name."""

    sources: tuple[SourceShards, ...]
    split: Split

    @property
    def num_records(self) -> int:
        """The records of all sources."""
        return sum(source.num_records for source in self.sources)

    def fingerprint(self, sizes: Sequence[SourceSize]) -> int:
        """Return a number in [0, 2**63) that changes with any shard and any source's share."""
        shards = (shard.sha256 for source in self.sources for shard in source.shards)
        shares = (f"{size.name} {size.passes_per_epoch}" for size in sizes)
        return hash63("index", *shards, *shares, str(self.split))

    def sizes(self, config: LoaderConfig) -> list[SourceSize]:
        """Return how much of each source an epoch holds.

        With weights, an epoch is as long as all sources together, and a source whose share is more
        than it has comes round again within it.
        """
        weights = {n: exact(s.weight) for n, s in config.sources.items() if s.weight is not None}
        total = sum(weights.values(), Fraction(0))
        sizes = []
        for source in self.sources:
            if weights:
                passes = weights[source.name] / total * self.num_records / source.num_records
            else:
                share = config.sources.get(source.name, SourceConfig())
                passes = share.passes_per_epoch(source.name)
            sizes.append(SourceSize(source.name, source.counts, passes))
        return sizes


def read_index(corpus: Corpus, config: LoaderConfig) -> SampleIndex:
    """Return the index of a corpus's committed shards of one stage.

    Reads every ledger's small columns once. Raises LoaderError where there is nothing to train on.
    """
    split = Split(config.holdout_fraction, config.is_holdout)
    names = _source_names(corpus, config)
    sources = [_read_source(corpus, config.stage, name, split) for name in names]
    empty = [source.name for source in sources if not source.num_records]
    if empty:
        _log.warning("%s: nothing in %s to load on this side", corpus.root, _listed(empty))
        sources = [source for source in sources if source.num_records]
    index = SampleIndex(tuple(sources), split)
    if index.num_records < config.global_batch_size:
        raise LoaderError(
            f"corpus {corpus.root}: {_listed(names)} have {index.num_records:,} trainable records, "
            f"fewer than one global batch of {config.global_batch_size:,}; lower "
            "global_batch_size, loosen the selection or add data"
        )
    return index


def _source_names(corpus: Corpus, config: LoaderConfig) -> list[str]:
    there = corpus.sources(config.stage)
    unknown = sorted(config.sources.keys() - set(there))
    if unknown:
        raise LoaderError(
            f"corpus {corpus.root}: source {_listed(unknown)} has no {config.stage} shards, "
            f"only {_listed(there) or 'none'} has; correct `sources`, or {_MAKES[config.stage]} "
            "first"
        )
    names = sorted(config.sources) or there
    if not names:
        raise LoaderError(
            f"corpus {corpus.root} has no committed {config.stage} shard; {_MAKES[config.stage]} "
            "before training"
        )
    return names


def _read_source(corpus: Corpus, stage: str, name: str, split: Split) -> SourceShards:
    shards = corpus.shards(stage, name)
    if not shards:
        raise LoaderError(
            f"corpus {corpus.root}: source {name!r} has no committed {stage} shard; "
            f"{_MAKES[stage]} before training"
        )
    return SourceShards(name, tuple(shards), tuple(_count(corpus, shards, split)))


def _count(corpus: Corpus, shards: Sequence[ShardRecord], split: Split) -> Iterable[int]:
    def count(shard: ShardRecord) -> int:
        try:
            with corpus.open(shard, "parquet") as stream:
                return count_records(shard, stream, split)
        except ShardError as error:
            raise LoaderError(str(error)) from error

    if corpus.store.is_local:  # nothing to wait for, so threads only cost
        return [count(shard) for shard in shards]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(count, shards))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
