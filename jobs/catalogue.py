"""What exists, remembered: a resume on object storage reads only markers that are new to it.

A listing names each marker with the store's own tag of its content (ETag). What a marker said is
kept by that tag in `run/catalogue.parquet`; a marker with another tag, or none, is read again. The
file is a memory and nothing more: without it, or with a damaged one, everything is read.
"""

import io
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.stages.stage import Commit
from jobs.tidy import Tags, look
from pipeline.corpus import Corpus

_log = logging.getLogger(__name__)
FILE = "run/catalogue.parquet"
_NUM_READERS = 64  # requests that wait for their answers
_SCHEMA = pa.schema(
    [
        pa.field("folder", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("tag", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("inputs", pa.string()),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_failed", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Place:
    """Which shard of which stage."""

    folder: str
    source: str
    index: int


@dataclass
class Catalogue:
    """The markers of a corpus, by what they last said."""

    corpus: Corpus
    tags: Tags = field(default_factory=dict)
    """What a look at the corpus has just shown, so that nothing is listed twice."""
    commits: dict[Place, Commit] = field(default_factory=dict)

    @classmethod
    def load(cls, corpus: Corpus, tags: Tags | None = None) -> "Catalogue":
        """Return what is remembered of a corpus; nothing of one on a local disk, which is quick.

        `tags` is what `tidy` returned a moment ago.
        """
        tags = tags or {}
        data = None if corpus.store.is_local else corpus.store.read(FILE)
        if data is None:
            return cls(corpus, tags)
        try:
            rows = pq.read_table(io.BytesIO(data)).cast(_SCHEMA).to_pylist()
        except (pa.ArrowException, ValueError, OSError) as error:
            _log.info("%s/%s cannot be read, markers are: %s", corpus.root, FILE, error)
            return cls(corpus, tags)
        return cls(corpus, tags, dict(map(_entry, rows)))

    def of(self, folder: str, source: str) -> dict[int, Commit]:
        """Return the shards of a source that exist in a stage."""
        if self.corpus.store.is_local:
            return {r.index: Commit.of(r, tag="") for r in self.corpus.shards(folder, source)}
        tags = self.tags.get((folder, source))
        if tags is None:
            tags = look(self.corpus, folder, source)[1]
        known = {
            index: commit
            for index, tag in tags.items()
            if (commit := self.commits.get(Place(folder, source, index))) and commit.tag == tag
        }
        unread = [index for index in tags if index not in known]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            records = pool.map(lambda index: self.corpus.record(folder, source, index), unread)
            for index, record in zip(unread, records, strict=True):
                if record is not None:
                    known[index] = Commit.of(record, tag=tags[index])
        self.note((Place(folder, source, index), commit) for index, commit in known.items())
        return {index: known[index] for index in sorted(known)}

    def note(self, commits: Iterable[tuple[Place, Commit]]) -> None:
        """Remember what these markers say."""
        self.commits.update(commits)

    def save(self) -> None:
        """Write what is remembered; a failure costs the next run time and nothing else."""
        if self.corpus.store.is_local:
            return
        rows = [{**asdict(place), **asdict(commit)} for place, commit in self.commits.items()]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
        store = self.corpus.store
        try:
            store.fs.pipe_file(store.full(FILE), buffer.getvalue())
        except OSError as error:
            _log.info("%s/%s cannot be written: %s", self.corpus.root, FILE, error)


def _entry(row: dict[str, Any]) -> tuple[Place, Commit]:
    place = Place(row.pop("folder"), row.pop("source"), row.pop("index"))
    return place, Commit(**row)
