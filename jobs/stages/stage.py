"""What a stage is to the driver: a name, a place in the chain, and something that makes shards."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.download_outcome import DownloadOutcome
from pipeline.record import Counts, ShardRecord
from pipeline.sources.shards import SourceShard


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to be made by one stage; small, for it travels to the worker."""

    folder: str
    """The stage's folder in the corpus: raw, captions or clean."""
    source: str
    index: int
    num_rows: int
    """Rows of the source's list that the shard stands for, whatever became of them."""
    shard: SourceShard | None = None
    """Where those rows stand; for a download."""

    @property
    def name(self) -> str:
        """What messages call the shard, as its marker does."""
        return f"{self.folder}/{self.source}/{self.index:05d}"

    @property
    def key(self) -> tuple[str, int]:
        """What the shard is called in every stage."""
        return self.source, self.index


@dataclass(frozen=True, slots=True)
class Commit:
    """What the driver remembers of a shard that exists."""

    sha256: str
    inputs: str | None
    fingerprint: str
    num_rows: int
    num_failed: int = 0
    tag: str = ""
    """MD5 of the marker, which object stores list: it says whether this is what is there."""

    @classmethod
    def of(cls, record: ShardRecord, tag: str | None = None) -> "Commit":
        """Return the part of a marker that decides what is to be done.

        The tag is computed unless it is given; an empty one is as good where nobody asks for it.
        """
        if tag is None:
            tag = hashlib.md5(record.to_bytes(), usedforsecurity=False).hexdigest()
        return cls(
            sha256=record.sha256,
            inputs=record.inputs,
            fingerprint=record.fingerprint,
            num_rows=record.rows_in,
            num_failed=sum(record.counts.failed.values()),
            tag=tag,
        )


@dataclass(frozen=True, slots=True)
class Made:
    """A shard that exists now, and what making it came to."""

    commit: Commit
    counts: Counts
    is_new: bool
    num_kept: int
    """Images that this attempt brought through; 0 where the shard existed."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds by what they were spent on, where the maker keeps count."""
    download: DownloadOutcome | None = None
    seconds: float = 0.0
    """In the worker."""

    def timed(self, seconds: float) -> "Made":
        """Return the same, with how long it took."""
        return replace(self, seconds=seconds)


@dataclass(frozen=True, slots=True)
class Live:
    """How a maker in the driver's own process tells of its rows, and learns that it should stop."""

    on_rows: Callable[[int, int], None]
    """Called with rows done and rows kept, on the thread that makes the shard."""
    should_stop: Callable[[], bool]


class StoppedError(Exception):
    """The maker was asked to stop; there is no shard."""


class Maker(Protocol):
    """Makes the shards of one stage, one at a time."""

    def make(self, task: Task) -> Made:
        """Return the shard, made unless it exists.

        Safe to repeat, also while another process makes the same one. Raises ShardError,
        SourceError, OSError, StoppedError, and UserError that ends the run; all else is a bug.
        """


class Stage(Protocol):
    """One step of a run; it travels to the workers, so it holds configuration and nothing open."""

    @property
    def name(self) -> str:
        """What people call it: download, score, select."""

    @property
    def folder(self) -> str:
        """The folder its shards stand in: raw, captions, clean."""

    def accepts(self, record: ShardRecord) -> bool:
        """Say whether a shard that exists is as this stage would make it, or to be made anew.

        Raises UserError where it is neither: a corpus never mixes what was made differently.
        """

    def open(self, live: Live) -> AbstractContextManager[Maker]:
        """Open what is needed to make shards; done once in each worker.

        Raises UserError where that is for the user to mend.
        """
