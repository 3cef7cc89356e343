"""A data run, in order: is this the corpus's recipe, what is missing, make it, tidy up."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import yaml

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.plan import SourcePlan, plan_run
from jobs.progress import Meter, stage_meter
from jobs.recipe import Recipe
from jobs.summary import RunSummary
from pipeline.corpus import Corpus
from pipeline.download import STAGE, Downloader, ShardDownload, Watch
from pipeline.download_order import DownloadStoppedError
from pipeline.download_row import RowResult
from pipeline.fetch import Fetcher
from pipeline.runfile import FingerprintError, RunFileError, check_same
from pipeline.sample import ShardError, Verdict, canonical_json
from pipeline.sources.rows import SourceError
from pipeline.sources.shards import SourceShard, read_shard


def download(recipe: Recipe, should_stop: Callable[[], bool]) -> RunSummary:
    """Make every raw shard that is missing; what exists is left as it is.

    Raises UserError when the corpus was begun with another recipe or a source cannot be read.
    """
    with _opened(recipe) as corpus:
        plans = plan_run(recipe, corpus)
        _refuse_other_makers(plans, fingerprint(recipe))
        work = [(plan, shard) for plan in plans for shard in plan.missing]
        total = sum(plan.num_records for plan in plans)
        reached = total - sum(shard.num_records for _, shard in work)
        with _downloader(recipe, corpus, total, reached, should_stop) as downloader:
            summary = _each_shard(
                work,
                lambda plan, shard: downloader.download(
                    plan.config.name, shard.index, read_shard(plan.config, shard)
                ),
            )
        summary.num_done += sum(len(plan.done) for plan in plans)
        return summary


def retry(
    recipe: Recipe, should_stop: Callable[[], bool], *, is_only_transient: bool = True
) -> RunSummary:
    """Visit the failed rows of committed shards again; what succeeded is copied byte for byte.

    Raises UserError as `download` does.
    """
    with _opened(recipe) as corpus:
        plans = plan_run(recipe, corpus)
        _refuse_other_makers(plans, fingerprint(recipe))
        work = [(plan, shard) for plan in plans for shard in plan.committed]
        total = sum(sum(plan.done[s.index].counts.failed.values()) for plan, s in work)
        with _downloader(recipe, corpus, total, 0, should_stop) as downloader:
            return _each_shard(
                work,
                lambda plan, shard: downloader.retry(
                    plan.done[shard.index],
                    read_shard(plan.config, shard),
                    is_only_transient=is_only_transient,
                ),
            )


def fingerprint(recipe: Recipe) -> str:
    """Return the name of all that decides a raw shard's bytes."""
    return hashlib.sha256(canonical_json(recipe.content()).encode()).hexdigest()[:16]


@contextmanager
def _opened(recipe: Recipe) -> Iterator[Corpus]:
    """Give the corpus if it is this recipe's, tidied before and after."""
    corpus = open_corpus(recipe.root)
    description = {
        "capfilt": version("capfilt"),
        "recipe": recipe.model_dump(mode="json"),
        "content": recipe.content(),
    }
    try:
        stored = corpus.write_run(yaml.safe_dump(description, sort_keys=False))
        check_same(yaml.safe_load(stored)["content"], recipe.content())
    except (FingerprintError, RunFileError) as error:
        raise UserError(f"{corpus.root}: {error}") from error
    corpus.sweep()
    yield corpus
    corpus.sweep()


def _refuse_other_makers(plans: list[SourcePlan], current: str) -> None:
    for plan in plans:
        for record in plan.done.values():
            if record.fingerprint != current:
                raise UserError(
                    f"shard {record.name} was made by another recipe (fingerprint "
                    f"{record.fingerprint}, now {current}); a corpus never mixes recipes: delete "
                    f"{STAGE}/{record.source} or write to another root"
                )


@contextmanager
def _downloader(
    recipe: Recipe, corpus: Corpus, total: int, reached: int, should_stop: Callable[[], bool]
) -> Iterator[Downloader]:
    with (
        Fetcher(recipe.fetch) as fetcher,
        stage_meter("download", total, unit="rows", resumed=reached, stream=sys.stderr) as meter,
    ):
        yield Downloader(
            corpus,
            recipe.download,
            fetcher,
            fingerprint=fingerprint(recipe),
            blocklist=recipe.fetch.blocklist,
            watch=Watch(on_row=_counter(meter), should_stop=should_stop),
        )


def _counter(meter: Meter) -> Callable[[RowResult], None]:
    def count(result: RowResult) -> None:
        meter.advance(1, int(result.verdict is Verdict.KEPT))

    return count


def _each_shard(
    work: list[tuple[SourcePlan, SourceShard]],
    make: Callable[[SourcePlan, SourceShard], ShardDownload],
) -> RunSummary:
    """Make one shard after the other; one that fails is set aside and the rest go on."""
    summary = RunSummary()
    for plan, shard in work:
        try:
            summary.add(make(plan, shard))
        except DownloadStoppedError:
            summary.is_stopped = True
            break
        except (ShardError, SourceError) as error:
            summary.failures[f"{STAGE}/{plan.config.name}/{shard.index:05d}"] = str(error)
    return summary
