"""The chain of stages over a corpus: which shards there are to be, and which exist as they should.

Everything is read from the source lists and the markers; a run that was killed is no different from
one that has just begun.
"""

from collections.abc import Sequence

from jobs.board import Board, Key, Limits, StageBoard
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


def lay_out(recipe: Recipe, corpus: Corpus, stages: Sequence[Stage]) -> Board:
    """Return what is to be done by these stages, upstream first, and what exists already.

    Raises UserError when a source cannot be read, or shards were made by another recipe.
    """
    boards: list[StageBoard] = []
    for stage in stages:
        if isinstance(stage, DownloadStage):
            boards.append(_downloads(recipe, corpus, stage))
            continue
        boards = boards or [_given(recipe, corpus, folder) for folder in _above(stage.folder)]
        tasks = {
            key: Task(stage.folder, task.source, task.index, task.num_rows)
            for key, task in boards[-1].tasks.items()
        }
        done = commits(recipe, corpus, stage.folder, stage)
        boards.append(StageBoard(stage.name, stage.folder, tasks, done=done))
    return Board(boards, limits_of(recipe.run, [stage.name for stage in stages]))


def commits(recipe: Recipe, corpus: Corpus, folder: str, stage: Stage | None) -> Commits:
    """Return the shards of the recipe's sources that exist in a folder, as the stage wants them."""
    return {
        (source.name, record.index): Commit.of(record)
        for source in recipe.sources
        for record in corpus.shards(folder, source.name)
        if stage is None or stage.accepts(record)
    }


def _downloads(recipe: Recipe, corpus: Corpus, stage: DownloadStage) -> StageBoard:
    plans = plan_run(recipe, corpus)
    tasks: dict[Key, Task] = {}
    done: Commits = {}
    for plan in plans:
        source = plan.config.name
        for made in plan.done.values():
            stage.accepts(made)
        for shard in plan.shards:
            key, record = (source, shard.index), plan.done.get(shard.index)
            if stage.visit is Visit.MISSING:
                if record is not None:
                    done[key] = Commit.of(record)
                num_rows = shard.num_records
            elif record is None:
                continue  # there is nothing to visit again
            else:
                num_rows = sum(record.counts.failed.values())
            tasks[key] = Task(stage.folder, source, shard.index, num_rows, shard)
    return StageBoard(stage.name, stage.folder, tasks, done=done)


def _given(recipe: Recipe, corpus: Corpus, folder: str) -> StageBoard:
    """Return a stage that the run starts below: its shards are those that exist."""
    done = commits(recipe, corpus, folder, None)
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
