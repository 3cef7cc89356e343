"""Rows of a source become a committed raw shard, in img2dataset's layout.

    downloader = Downloader(corpus, DownloadConfig(), fetcher, fingerprint=...)
    done = downloader.download("cc3m", 42, read_shard(source_config, plan))
    print(*done.outcome.lines(), sep="\\n")

**What is img2dataset's and what is not.** The layout (`00042.tar` with key.jpg, key.json, key.txt
and `00042.parquet` with one row per URL), keys, column names, the words of `status` and the names
and meanings of resize modes are img2dataset's, so that its readers and its users feel at home. Its
`Downloader` is not used, though it can be (`pipeline.opener` gives it our guarded opener). It would
stand in the way of what a corpus promises: it writes samples in the order they arrive, so no two
runs give the same bytes; it retries at once and whatever the cause was; it prints and swallows what
goes wrong while a sample is written, and the row is gone; it holds images in proportion to its
threads, but decodes with one of them and without looking at the size first; for each image it
points the process's standard output elsewhere, under every other thread; and importing it costs
seconds and 400 MB in every worker. Its loop is what this module and `download_order` replace.

**The ledger** has one row per input row with verdict, reason, HTTP status and number of attempts:
the same answers from the web give the same bytes. How long each fetch took, and in which words a
broken connection was reported, is not in it, for no two runs agree on that: `Watch.on_row` is told
both, and the outcome sums the times per host.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field

from pipeline.commit import ShardWriter
from pipeline.corpus import Corpus
from pipeline.download_order import Crew, CrewLimits, RowToVisit, Step, WaitingRoom
from pipeline.download_outcome import DownloadOutcome
from pipeline.download_retry import PreviousShard
from pipeline.download_row import RAW_SCHEMA, RowResult, RowVisitor
from pipeline.fetch import Fetcher
from pipeline.images import ImageConfig
from pipeline.ledger import LedgerWriter
from pipeline.local_images import LocalImages
from pipeline.record import ShardRecord
from pipeline.sample import ShardError
from pipeline.sources.rows import MalformedRow, SourceRow
from pipeline.tar import TarWriter
from pipeline.web.config import Blocklist

STAGE = "raw"
Rows = Iterable[SourceRow | MalformedRow]
_PACE = ("num_threads", "num_decoders", "max_rows_ahead", "max_waiting_bytes")
_ROWS_PER_GROUP = 1000  # of the ledger; what is held of it in memory


class DownloadConfig(ImageConfig):
    """How rows become raw shards, and their images what they are to be.

    How the web is treated is `FetchConfig`'s.
    """

    rows_per_shard: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    num_threads: Annotated[int, Field(ge=1, le=1024)] = 32
    """Rows in flight per process; most of them wait for the web."""
    num_decoders: Annotated[int, Field(ge=1)] = 2
    """Images decoded at a time per process; see `max_pixels` for what each may take."""
    max_rows_ahead: Annotated[int, Field(ge=1)] = 8192
    """How far rows may run ahead of one that takes long."""
    max_waiting_bytes: Annotated[int, Field(ge=0)] = 64 * 2**20
    """Of samples that wait for their turn in memory; beyond it they wait on disk."""
    max_local_bytes: Annotated[int, Field(ge=1)] = 100 * 2**20
    """The largest image that is read from disk; the web's are capped by `FetchConfig`."""

    def content(self) -> dict[str, Any]:
        """Return the settings that decide what shards hold, for their fingerprint.

        The others decide speed and memory alone, and may differ from machine to machine.
        """
        return self.model_dump(mode="json", exclude=set(_PACE))


def _ignore(result: RowResult) -> None:
    """Tell nobody."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told how a download goes, and may stop it; called on the thread that downloads."""

    on_row: Callable[[RowResult], None] = _ignore
    """Each row as soon as it has been visited, in any order."""
    should_stop: Callable[[], bool] = _never
    """Asked between rows and twice a second."""


@dataclass(frozen=True, slots=True)
class ShardDownload:
    """A committed shard, and what this download of it came to."""

    record: ShardRecord
    outcome: DownloadOutcome  # empty when the shard was there already
    is_new: bool


class Downloader:
    """Downloads shards one at a time, each with many threads; run one per core."""

    def __init__(
        self,
        corpus: Corpus,
        config: DownloadConfig,
        fetcher: Fetcher,
        *,
        fingerprint: str,
        blocklist: Blocklist | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`fingerprint` names what makes the shards; the fetcher stays its owner's to close.

        Of the blocklist the hashes are used here, the rest is the fetcher's.
        """
        self._corpus = corpus
        self._config = config
        self._fetcher = fetcher
        self._fingerprint = fingerprint
        self._blocked_sha256 = frozenset((blocklist or Blocklist()).image_sha256)
        self._watch = watch or Watch()

    def download(self, source: str, index: int, rows: Rows) -> ShardDownload:
        """Return shard `index` of a source, made from its rows unless it exists.

        Raises DownloadStoppedError when asked to stop, and ShardError; then there is no shard. Safe
        to repeat, also while another process makes the same shard: one of them wins whole.
        """
        existing = self._corpus.record(STAGE, source, index)
        if existing is not None:
            return ShardDownload(existing, DownloadOutcome(), is_new=False)
        name = f"{STAGE}/{source}/{index:05d}"
        with self._corpus.writer(STAGE, source, index, fingerprint=self._fingerprint) as writer:
            return self._write(writer, self._steps(name, index, rows), None)

    def retry(
        self, record: ShardRecord, rows: Rows, *, is_only_transient: bool = True
    ) -> ShardDownload:
        """Return the shard with its failed rows visited again, replaced at once and as a whole.

        `rows` are the shard's, as they were downloaded. Rows that were kept or dropped are copied,
        byte for byte; of failed ones all are visited, or those that failed for a cause that may
        pass. Raises DownloadStoppedError and ShardError; then the shard is as it was. Safe to
        repeat.
        """
        with PreviousShard(self._corpus, record, is_only_transient=is_only_transient) as previous:
            if not previous.has_rows_to_visit():
                return ShardDownload(record, DownloadOutcome(), is_new=False)
            steps = previous.steps(self._steps(record.name, record.index, rows))
            with self._corpus.writer(
                STAGE,
                record.source,
                record.index,
                fingerprint=self._fingerprint,
                inputs=record.inputs,
                replace=record,
            ) as writer:
                return self._write(writer, steps, previous)

    def _steps(self, name: str, index: int, rows: Rows) -> Iterator[RowToVisit]:
        for number, row in enumerate(rows):
            if number >= self._config.rows_per_shard:
                raise ShardError(
                    f"shard {name}: more than {self._config.rows_per_shard} rows; plan the source "
                    "with the same rows_per_shard"
                )
            yield RowToVisit(key_of(index, number, self._config.rows_per_shard), row)

    def _write(
        self, writer: ShardWriter, steps: Iterator[Step], previous: PreviousShard | None
    ) -> ShardDownload:
        started_at = time.monotonic()
        outcome = DownloadOutcome()
        with (
            closing(self._results(writer.folder, steps)) as results,
            _ShardFiles(writer.path("tar"), writer.path("parquet")) as files,
        ):
            for result in results:
                members = result.members
                if previous is not None and result.is_copied:
                    members = previous.members_of(result)
                else:
                    outcome.add_row(result, self._image_bytes(members))
                files.write(result, members)
        record = writer.commit(rows_in=files.ledger.num_rows, counts=files.ledger.counts)
        outcome.elapsed_seconds = time.monotonic() - started_at
        return ShardDownload(record, outcome, is_new=True)

    def _results(self, folder: str, steps: Iterator[Step]) -> Generator[RowResult, None, None]:
        config = self._config
        limits = CrewLimits(
            num_threads=config.num_threads,
            max_rows_ahead=config.max_rows_ahead,
        )
        with (
            LocalImages(config.max_local_bytes) as local_images,
            WaitingRoom(f"{folder}/waiting", config.max_waiting_bytes) as room,
        ):
            visitor = RowVisitor(
                config,
                self._fetcher.fetch,
                local_images,
                num_decoders=config.num_decoders,
                blocked_sha256=self._blocked_sha256,
            )
            crew = Crew(visitor.visit, limits, room, self._watch.should_stop)
            yield from crew.work(steps, self._watch.on_row)

    def _image_bytes(self, members: Mapping[str, bytes] | None) -> int:
        return len(members[self._config.encode_format]) if members else 0


class _ShardFiles:
    """The two files of a shard in the making."""

    def __init__(self, tar_path: str, ledger_path: str) -> None:
        self._stream = open(tar_path, "wb")  # noqa: SIM115 - closed by __exit__
        self._tar = TarWriter(self._stream)
        self.ledger = LedgerWriter(ledger_path, RAW_SCHEMA, _ROWS_PER_GROUP)

    def write(self, result: RowResult, members: Mapping[str, bytes] | None) -> None:
        self.ledger.write(result.ledger)
        if members is not None:
            self._tar.write(result.key, members)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tar.__exit__(kind, error, trace)
        self.ledger.__exit__(kind, error, trace)
        self._stream.close()


def key_of(index: int, number: int, rows_per_shard: int) -> str:
    """Return the key of row `number` of shard `index`, as img2dataset numbers them."""
    num_digits = math.ceil(math.log10(rows_per_shard))
    return f"{10**num_digits * index + number:0{5 + num_digits}d}"
