"""A data run, in order: is the corpus this recipe's and free, what is missing, make it, sum up."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version

import yaml

from jobs.catalogue import Catalogue
from jobs.chain import lay_out
from jobs.corpus_root import open_corpus
from jobs.durable import Condition, driving
from jobs.errors import RunError, UserError
from jobs.in_process import work_in_process
from jobs.places import refuse_relative
from jobs.problems import storage_explained
from jobs.recipe import Recipe
from jobs.stages.download import Visit
from jobs.stages.stage import Stage
from jobs.stages.stages import chain_of, stages_of
from jobs.summary import RunSummary
from jobs.tidy import tidy
from jobs.watching import Watching, watched
from pipeline.corpus import Corpus
from pipeline.runfile import FingerprintError, RunFileError, check_same

ShouldStop = Callable[[], bool]


def run(
    recipe: Recipe, should_stop: ShouldStop, *, address: str | None = None, command: str = ""
) -> RunSummary:
    """Make all that is missing, every stage as soon as the one above has a shard for it.

    `address` is a Ray cluster's; `command` is what was typed. Raises UserError when the corpus was
    begun with another recipe, another run is at work on it, or a source cannot be read, and
    RunError when it breaks off.
    """
    return run_stages(recipe, chain_of(recipe), should_stop, address=address, command=command)


def run_stage(
    recipe: Recipe,
    stage: str,
    should_stop: ShouldStop,
    *,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Make what is missing of one stage, from what the stage above has. Raises as `run` does.

    Clean shards of another policy are replaced when it is `select` that is asked for.
    """
    stages = stages_of(recipe, [stage])
    return run_stages(recipe, stages, should_stop, address=address, command=command)


def download(recipe: Recipe, should_stop: ShouldStop) -> RunSummary:
    """Make every raw shard that is missing. Raises as `run` does."""
    return run_stage(recipe, "download", should_stop)


def retry(
    recipe: Recipe,
    should_stop: ShouldStop,
    *,
    is_only_transient: bool = True,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Visit the failed rows of committed shards again; what succeeded is copied byte for byte.

    Raises as `run` does.
    """
    visit = Visit.TRANSIENT if is_only_transient else Visit.FAILED
    stages = stages_of(recipe, ["download"], visit=visit)
    return run_stages(recipe, stages, should_stop, address=address, command=command)


def run_stages(
    recipe: Recipe,
    stages: Sequence[Stage],
    should_stop: ShouldStop,
    *,
    address: str | None = None,
    command: str = "",
) -> RunSummary:
    """Run these stages, upstream first, over the recipe's corpus. Raises as `run` does."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address and recipe.run.wants_ray(address):
        refuse_relative(recipe)  # a worker stands in another folder than this process
    corpus = open_corpus(recipe.root)
    with storage_explained(corpus), ExitStack() as until_done:
        _check_recipe(recipe, corpus)
        heart = until_done.enter_context(
            driving(corpus, recipe.run, name=recipe.name, command=command)
        )
        catalogue = Catalogue.load(corpus, tidy(corpus))
        board = lay_out(recipe, catalogue, stages)
        with watched(board, heart, catalogue, should_stop) as watching:
            _make(recipe, stages, watching, address)
        if heart.is_lost:
            raise RunError(f"{corpus.root}: another run has taken over, and goes on from here")
        summary = RunSummary.of(watching)
        if summary.num_new or summary.failures:
            tidy(corpus)
        heart.tell(condition=_condition(summary))
    return summary


def _check_recipe(recipe: Recipe, corpus: Corpus) -> None:
    """Return if the corpus is this recipe's, or is so from now on."""
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


def _make(recipe: Recipe, stages: Sequence[Stage], watching: Watching, address: str | None) -> None:
    config = recipe.run
    if not config.wants_ray(address) or watching.board.is_finished:
        work_in_process(stages, watching.board, watching)
        return
    # Importing Ray takes a second, which a run in one process does not spend.
    from jobs.driver import work_on_ray
    from jobs.ray_start import ray_place

    with ray_place(config, [stage.name for stage in stages], address) as place:
        watching.heart.tell(engine="ray")
        work_on_ray(stages, watching.board, watching, config, place)


def _condition(summary: RunSummary) -> Condition:
    if summary.is_stopped:
        return Condition.STOPPED
    return Condition.SOME_FAILED if summary.failures else Condition.DONE
