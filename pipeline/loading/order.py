"""The order of training samples: a pure function of the seed, unending, and the same for any world.

Every source is an endless row of passes, each a permutation of all its records: shards in random
order, shuffled within groups of some shards, so that few need to be at hand at once. An epoch takes
the next so many records of each source, one pass unless told otherwise, and deals them out evenly.
Epochs follow each other without a gap: a batch may hold the last records of one and the first of
the next, and none is ever dropped. A position counts records from the start of training, so step k
of global batch B is positions k B to (k + 1) B, however many ranks share them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np
import numpy.typing as npt

from pipeline.loading.draws import permutation

Integers = npt.NDArray[np.int64]

_MAX_EPOCH_RECORDS = 3_000_000_000  # products of two positions must fit 63 bits
_CACHED_GROUPS = 4  # for each source: the one that is read, and what a seek goes back to


@dataclass(frozen=True, slots=True)
class SourceSize:
    """How many records each shard of a source holds, and how often an epoch goes over it."""

    name: str
    shard_records: tuple[int, ...]
    passes_per_epoch: Fraction = Fraction(1)

    @property
    def num_records(self) -> int:
        """The records of one pass."""
        return sum(self.shard_records)

    def records_before(self, epoch: int) -> int:
        """Return how many records of the endless row the epochs before this one take."""
        return floor(epoch * self.passes_per_epoch * self.num_records)


@dataclass(frozen=True, slots=True)
class Refs:
    """Records by number, one row each, all (N,) int64."""

    source: Integers
    shard: Integers  # among the source's shards
    record: Integers  # within the shard
    visit: Integers  # how many times the record was seen before: the number of its pass

    def __len__(self) -> int:
        return len(self.source)

    def part(self, start: int, stop: int) -> "Refs":
        """Return the rows from start to before stop."""
        return Refs(*(column[start:stop] for column in self._columns()))

    def rows(self) -> list[tuple[int, int, int, int]]:
        """Return (source, shard, record, visit) of each row."""
        return list(zip(*(column.tolist() for column in self._columns()), strict=True))

    def _columns(self) -> tuple[Integers, Integers, Integers, Integers]:
        return self.source, self.shard, self.record, self.visit


class Order:
    """The endless order of the records of some sources."""

    def __init__(self, sources: Sequence[SourceSize], *, seed: int, group_shards: int) -> None:
        """Raises ValueError for a source without records, or an epoch too long to count."""
        for source in sources:
            if source.num_records < 1:
                raise ValueError(f"source {source.name!r} has no records")
        self._sources = tuple(sources)
        self._passes = [_Passes(source, seed, group_shards) for source in sources]
        if not 1 <= self.epoch_start(1) <= _MAX_EPOCH_RECORDS:
            raise ValueError(f"the first epoch has {self.epoch_start(1):,} records")

    def epoch_start(self, epoch: int) -> int:
        """Return the position of an epoch's first record; that of epoch 1 is epoch 0's length."""
        return sum(source.records_before(epoch) for source in self._sources)

    def epoch_of(self, position: int) -> int:
        """Return the epoch that a position belongs to."""
        high = 1
        while self.epoch_start(high) <= position:
            high *= 2
        return bisect_right(range(high), position, key=self.epoch_start) - 1

    def records(self, start: int, stop: int) -> Refs:
        """Return the records at positions start to before stop."""
        parts = []
        while start < stop:
            epoch = self.epoch_of(start)
            end = min(stop, self.epoch_start(epoch + 1))
            parts.append(self._of_epoch(epoch, start, end))
            start = end
        columns = zip(*(part._columns() for part in parts), strict=True)
        return Refs(*(np.concatenate(column) for column in columns))

    def groups(self, start: int, stop: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return (source, shards) of the groups that positions start to before stop read from.

        For each source it also names the group after the last of these, which is read next.
        """
        first, last = self._progress(start), self._progress(stop)
        found = []
        for number, (passes, begin, end) in enumerate(zip(self._passes, first, last, strict=True)):
            found += [(number, shards) for shards in passes.groups(begin, end)]
        return found

    def _progress(self, position: int) -> list[int]:
        """Return how many records of each source's endless row lie before a position."""
        epoch = self.epoch_of(position)
        slots = np.array([position - self.epoch_start(epoch)], dtype=np.int64)
        return [
            source.records_before(epoch) + int(taken[0])
            for source, taken in zip(
                self._sources, _dealt_before(slots, self._counts(epoch)), strict=True
            )
        ]

    def _counts(self, epoch: int) -> list[int]:
        return [s.records_before(epoch + 1) - s.records_before(epoch) for s in self._sources]

    def _of_epoch(self, epoch: int, start: int, stop: int) -> Refs:
        slots = np.arange(start, stop, dtype=np.int64) - self.epoch_start(epoch)
        owner, rank = _deal(slots, self._counts(epoch))
        refs = Refs(owner, *(np.empty_like(owner) for _ in range(3)))
        for number, (source, passes) in enumerate(zip(self._sources, self._passes, strict=True)):
            rows = np.flatnonzero(owner == number)
            if len(rows):
                found = passes.locate(source.records_before(epoch) + rank[rows])
                refs.shard[rows], refs.record[rows], refs.visit[rows] = found
        return refs


def _dealt_before(slots: Integers, counts: Sequence[int]) -> list[Integers]:
    """Return for each source how many of its records lie before each slot of an epoch.

    The last source takes its share of all slots as evenly as integers allow, the one before it its
    share of the slots that are left, and so on: exact, and open at any point without a table.
    """
    dealt: list[Integers] = []
    total = sum(counts)
    for count in reversed(counts):
        taken = slots * count // max(total, 1)
        dealt.append(taken)
        slots, total = slots - taken, total - count
    return dealt[::-1]


def _deal(slots: Integers, counts: Sequence[int]) -> tuple[Integers, Integers]:
    """Return the source of each slot of an epoch, and which of the source's records it is."""
    owner, rank = np.zeros_like(slots), np.zeros_like(slots)
    before, after = _dealt_before(slots, counts), _dealt_before(slots + 1, counts)
    for number, (low, high) in enumerate(zip(before, after, strict=True)):
        is_owner = high > low
        owner[is_owner], rank[is_owner] = number, low[is_owner]
    return owner, rank


@dataclass(frozen=True, slots=True)
class _PassPlan:
    """The order of shards of one pass, in groups."""

    groups: list[Integers]  # the shards of each, by number
    starts: Integers  # where each begins in the pass, and where the last one ends


class _Passes:
    """A source's endless row of passes."""

    def __init__(self, source: SourceSize, seed: int, group_shards: int) -> None:
        self._subject = (seed, source.name)
        self._group_shards = group_shards
        sizes = np.array(source.shard_records, dtype=np.int64)
        self._sizes = sizes
        self._shards = np.flatnonzero(sizes)  # an empty shard is in no group
        self._num_records = int(sizes.sum())
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._group = lru_cache(maxsize=_CACHED_GROUPS)(self._make_group)

    def locate(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Return shard, record and pass of these positions of the row, which must ascend."""
        visit, place = np.divmod(positions, self._num_records)
        shard, record = np.empty_like(place), np.empty_like(place)
        for number in np.unique(visit).tolist():
            plan = self._plan(number)
            rows = np.flatnonzero(visit == number)
            group = np.searchsorted(plan.starts, place[rows], side="right") - 1
            for each in np.unique(group).tolist():
                chosen = rows[group == each]
                shards, records = self._group(number, each)
                within = place[chosen] - plan.starts[each]
                shard[chosen], record[chosen] = shards[within], records[within]
        return shard, record, visit

    def groups(self, start: int, stop: int) -> list[tuple[int, ...]]:
        """Return the shards of each group from position start to stop, and of the one after."""
        found: list[tuple[int, ...]] = []
        position, is_after = start, False
        while not is_after:
            is_after = position >= stop and bool(found)
            number, place = divmod(position, self._num_records)
            plan = self._plan(number)
            group = int(np.searchsorted(plan.starts, place, side="right")) - 1
            found.append(tuple(plan.groups[group].tolist()))
            position = number * self._num_records + int(plan.starts[group + 1])
        return found

    def _make_plan(self, number: int) -> _PassPlan:
        shards = self._shards[permutation(len(self._shards), "shards", *self._subject, number)]
        cuts = range(self._group_shards, len(shards), self._group_shards)
        groups = np.split(shards, list(cuts))
        ends = np.cumsum([self._sizes[group].sum() for group in groups], dtype=np.int64)
        return _PassPlan(groups, np.concatenate((np.zeros(1, dtype=np.int64), ends)))

    def _make_group(self, number: int, group: int) -> tuple[Integers, Integers]:
        """Return shard and record of each place in a group, shuffled over its shards."""
        shards = self._plan(number).groups[group]
        sizes = self._sizes[shards]
        ends = np.cumsum(sizes)
        mixed = permutation(int(ends[-1]), "records", *self._subject, number, group)
        which = np.searchsorted(ends, mixed, side="right")
        return shards[which], mixed - (ends - sizes)[which]
