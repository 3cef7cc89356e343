"""The download stage: rows of the source lists -> raw shards, or failed rows of raw shards anew."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.stages.stage import Commit, Live, Made, StoppedError, Task
from pipeline.corpus import Corpus
from pipeline.download import STAGE, Downloader, ShardDownload, Watch
from pipeline.download_order import DownloadStoppedError
from pipeline.download_row import RowResult
from pipeline.fetch import Fetcher
from pipeline.record import ShardRecord
from pipeline.sample import ShardError, Verdict, canonical_json
from pipeline.sources.shards import read_shard


class Visit(StrEnum):
    """Which rows a download visits."""

    MISSING = "missing"
    TRANSIENT = "transient"
    FAILED = "failed"


def download_fingerprint(recipe: Recipe) -> str:
    """Return the name of all that decides a raw shard's bytes."""
    whole = recipe.content()
    content = {key: whole[key] for key in ("seed", "sources", "fetch", "download")}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class DownloadStage:
    """Makes the raw shards that are missing, or visits the failed rows of those that exist."""

    recipe: Recipe
    visit: Visit = Visit.MISSING
    num_workers: int = 1
    """Processes that share what may be asked of one host."""
    name: str = "download"
    folder: str = STAGE

    def accepts(self, record: ShardRecord) -> bool:
        """Return True for a shard of this recipe. Raises UserError for any other."""
        current = download_fingerprint(self.recipe)
        if record.fingerprint != current:
            raise UserError(
                f"shard {record.name} was made by another recipe (fingerprint "
                f"{record.fingerprint}, now {current}); a corpus never mixes recipes: delete "
                f"{record.stage}/{record.source} or write to another root"
            )
        return True

    @contextmanager
    def open(self, live: Live) -> Iterator["DownloadMaker"]:
        """Open the corpus and a fetcher, which is closed on leaving."""

        def on_row(result: RowResult) -> None:
            live.on_rows(1, int(result.verdict is Verdict.KEPT))

        fetch = self.recipe.fetch
        per_host = max(1, fetch.max_connections_per_host // self.num_workers)
        corpus = open_corpus(self.recipe.root)
        with Fetcher(fetch.model_copy(update={"max_connections_per_host": per_host})) as fetcher:
            downloader = Downloader(
                corpus,
                self.recipe.download,
                fetcher,
                fingerprint=download_fingerprint(self.recipe),
                blocklist=fetch.blocklist,
                watch=Watch(on_row=on_row, should_stop=live.should_stop),
            )
            yield DownloadMaker(self, corpus, downloader)


@dataclass(frozen=True, slots=True)
class DownloadMaker:
    """A downloader with its corpus."""

    stage: DownloadStage
    corpus: Corpus
    downloader: Downloader

    def make(self, task: Task) -> Made:
        """Return the raw shard of a task (see `Maker.make`)."""
        try:
            done = self._download(task)
        except DownloadStoppedError as error:
            raise StoppedError(str(error)) from error
        return Made(
            commit=Commit.of(done.record),
            counts=done.record.counts,
            is_new=done.is_new,
            num_kept=done.outcome.total.num_kept,
            download=done.outcome,
        )

    def _download(self, task: Task) -> ShardDownload:
        assert task.shard is not None, "a download is told which rows"
        configs = {each.name: each for each in self.stage.recipe.sources}
        rows = read_shard(configs[task.source], task.shard)
        if self.stage.visit is Visit.MISSING:
            return self.downloader.download(task.source, task.index, rows)
        record = self.corpus.record(STAGE, task.source, task.index)
        if record is None:
            raise ShardError(
                f"shard {task.name} is gone since the retry began; `capfilt run` makes it anew"
            )
        is_only_transient = self.stage.visit is Visit.TRANSIENT
        return self.downloader.retry(record, rows, is_only_transient=is_only_transient)
