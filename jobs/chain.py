"""The chain of stages over a corpus: which shards there are to be, and which exist as they should.

Everything is read from the source lists and the markers; a run that was killed is no different from
one that has just begun.
"""

from collections.abc import Mapping, Sequence

from jobs.board import Board, Key, Limits, StageBoard
from jobs.catalogue import Catalogue
from jobs.plan import plan_run
from jobs.pools import shards_ahead
from jobs.recipe import Recipe
from jobs.run_config import RunConfig
from jobs.stages.download import DownloadStage, Visit
from jobs.stages.stage import Commit, Stage, Task
from pipeline.corpus import Corpus
from pipeline.layout import UPSTREAM

Commits = dict[Key, Commit]


def limits_of(config: RunConfig, stages: Sequence[str]) -> Limits:
    """Return the patience that a run's configuration asks for."""
    return Limits(
        attempts=config.attempts,
        max_shards_ahead=shards_ahead(config, list(stages)),
        straggler_factor=config.straggler_factor,
        straggler_seconds=config.straggler_seconds,
        storage_patience_seconds=config.storage_patience_seconds,
    )


def lay_out(recipe: Recipe, catalogue: Catalogue, stages: Sequence[Stage]) -> Board:
    """Return what is to be done by these stages, upstream first, and what exists already.

    Raises UserError when a source cannot be read, or shards were made by another recipe.
    """
    boards: list[StageBoard] = []
    for stage in stages:
        if isinstance(stage, DownloadStage):
            boards.append(_downloads(recipe, catalogue, stage))
            continue
        boards = boards or [_given(recipe, catalogue, folder) for folder in _above(stage.folder)]
        rows = boards[0].tasks  # images, of which captions' shards have several rows each
        tasks = {
            key: Task(stage.folder, *key, rows.get(key, task).num_rows)
            for key, task in boards[-1].tasks.items()
        }
        done: Commits = {}
        for source in recipe.sources:
            found = catalogue.of(stage.folder, source.name)
            accepted = _accepted(stage, catalogue.corpus, source.name, found)
            done |= {(source.name, index): commit for index, commit in accepted.items()}
        boards.append(StageBoard(stage.name, stage.folder, tasks, done=done))
    return Board(boards, limits_of(recipe.run, [stage.name for stage in stages]))


def _accepted(
    stage: Stage, corpus: Corpus, source: str, found: Mapping[int, Commit]
) -> dict[int, Commit]:
    """Return the shards that are as the stage wants them; of each fingerprint one is looked at."""
    verdicts: dict[str, bool] = {}
    for index, commit in found.items():
        if commit.fingerprint not in verdicts:
            record = corpus.record(stage.folder, source, index)
            if record is not None:  # else it is being replaced this very moment
                verdicts[record.fingerprint] = stage.accepts(record)
    return {i: commit for i, commit in found.items() if verdicts.get(commit.fingerprint, False)}


def _downloads(recipe: Recipe, catalogue: Catalogue, stage: DownloadStage) -> StageBoard:
    tasks: dict[Key, Task] = {}
    done: Commits = {}
    for plan in plan_run(recipe, catalogue):
        source = plan.config.name
        _accepted(stage, catalogue.corpus, source, plan.done)
        for shard in plan.shards:
            key, commit = (source, shard.index), plan.done.get(shard.index)
            if stage.visit is Visit.MISSING:
                if commit is not None:
                    done[key] = commit
                num_rows = shard.num_records
            elif commit is None:
                continue  # there is nothing to visit again
            else:
                num_rows = commit.num_failed
            tasks[key] = Task(stage.folder, source, shard.index, num_rows, shard)
    return StageBoard(stage.name, stage.folder, tasks, done=done)


def _given(recipe: Recipe, catalogue: Catalogue, folder: str) -> StageBoard:
    """Return a stage that the run starts below: its shards are those that exist."""
    done = {
        (source.name, index): commit
        for source in recipe.sources
        for index, commit in catalogue.of(folder, source.name).items()
    }
    tasks = {
        (source, index): Task(folder, source, index, commit.num_rows)
        for (source, index), commit in done.items()
    }
    return StageBoard(f"given {folder}", folder, tasks, is_given=True, done=done)


def _above(folder: str) -> list[str]:
    above: list[str] = []
    while folder in UPSTREAM:
        folder = UPSTREAM[folder]
        above.insert(0, folder)
    return above
