"""The stages that build a corpus, from URLs to clean shards, and the run of all of them."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import (
    BUILD,
    SOME_FAILED,
    AsJson,
    DryRun,
    Overrides,
    RecipeFile,
    Rehearsal,
    as_rehearsal,
    as_typed,
    warn_of_moving_models,
)
from jobs.errors import RunError, UserError

if TYPE_CHECKING:  # a command imports what it needs, so that --help and schema are instant
    from jobs.recipe import Recipe
    from jobs.summary import RunSummary

commands = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="HOST:PORT", help="Work on this Ray cluster; 'auto' for the local one."
    ),
]


@commands.command(
    rich_help_panel=BUILD, epilog="Example: capfilt run cc3m.yaml --set root=s3://bucket/cc3m"
)
def run(
    recipe: RecipeFile,
    sets: Overrides = None,
    address: Address = None,
    rehearsal: Rehearsal = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make all that is missing of a recipe's corpus, every stage as soon as it has work.

    With --set run.workers=8 it starts Ray on this machine and works with up to 8 processes a stage.
    """
    loaded = _load(recipe, sets, rehearsal)
    if dry_run:
        _describe(loaded, as_json)
        return

    def work(should_stop: Callable[[], bool]) -> "RunSummary":
        from jobs.whole import run_whole

        return run_whole(loaded, should_stop, address=address, command=again)

    again = as_typed("run", recipe, sets, *_place(address), *as_rehearsal(rehearsal))
    warn_of_moving_models(loaded)
    finish(work, again, as_json)


@commands.command(
    rich_help_panel=BUILD, epilog="Example: capfilt download cc3m.yaml --set root=cc3m --dry-run"
)
def download(
    recipe: RecipeFile,
    sets: Overrides = None,
    address: Address = None,
    rehearsal: Rehearsal = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the images of every source into raw shards, with a verdict for every row."""
    if dry_run:
        _describe(_load(recipe, sets, rehearsal), as_json)
        return
    _one_stage("download", recipe, sets, address, rehearsal, as_json)


@commands.command(rich_help_panel=BUILD, epilog="Example: capfilt retry cc3m.yaml --only transient")
def retry(
    recipe: RecipeFile,
    sets: Overrides = None,
    only: Annotated[
        str, typer.Option(help="Which failed rows: 'transient' or 'all'.", metavar="WHICH")
    ] = "transient",
    address: Address = None,
    rehearsal: Rehearsal = False,
    as_json: AsJson = False,
) -> None:
    """Visit failed rows of committed shards again, another day; what succeeded is not touched."""
    if only not in ("transient", "all"):
        raise UserError(f"--only {only}: neither 'transient' nor 'all'")
    loaded = _load(recipe, sets, rehearsal)

    def work(should_stop: Callable[[], bool]) -> "RunSummary":
        from jobs import run as jobs_run

        is_only_transient = only == "transient"
        return jobs_run.retry(
            loaded,
            should_stop,
            is_only_transient=is_only_transient,
            address=address,
            command=again,
        )

    others = (f"--only={only}", *_place(address), *as_rehearsal(rehearsal))
    again = as_typed("retry", recipe, sets, *others)
    finish(work, again, as_json)


@commands.command(rich_help_panel=BUILD, epilog="Example: capfilt score cc3m.yaml")
def score(
    recipe: RecipeFile,
    sets: Overrides = None,
    address: Address = None,
    rehearsal: Rehearsal = False,
    as_json: AsJson = False,
) -> None:
    """Caption raw shards and score every caption; nothing is thrown away."""
    _one_stage("score", recipe, sets, address, rehearsal, as_json)


@commands.command(
    rich_help_panel=BUILD, epilog="Example: capfilt select cc3m.yaml --set select.policy=blip2"
)
def select(
    recipe: RecipeFile,
    sets: Overrides = None,
    address: Address = None,
    rehearsal: Rehearsal = False,
    as_json: AsJson = False,
) -> None:
    """Keep the captions that a policy chooses; clean shards of another policy are made anew."""
    _one_stage("select", recipe, sets, address, rehearsal, as_json)


def _one_stage(
    stage: str,
    recipe: str,
    sets: list[str] | None,
    address: str | None,
    rehearsal: bool,
    as_json: bool,
) -> None:
    loaded = _load(recipe, sets, rehearsal)

    def work(should_stop: Callable[[], bool]) -> "RunSummary":
        from jobs import run as jobs_run

        return jobs_run.run_stage(loaded, stage, should_stop, address=address, command=again)

    again = as_typed(stage, recipe, sets, *_place(address), *as_rehearsal(rehearsal))
    finish(work, again, as_json)


def _load(recipe: str, sets: list[str] | None, rehearsal: bool) -> "Recipe":
    from jobs.recipe import load_recipe

    return load_recipe(recipe, sets or (), is_rehearsal=rehearsal)


def _describe(recipe: "Recipe", as_json: bool) -> None:
    from jobs.plan import describe_plan

    typer.echo(describe_plan(recipe, as_json=as_json))


def _place(address: str | None) -> tuple[str, ...]:
    return () if address is None else (f"--address={address}",)


def finish(work: Callable[[Callable[[], bool]], "RunSummary"], again: str, as_json: bool) -> None:
    """Do the work until done or told to stop, and say what it came to."""
    from jobs.stop import stop_on_signals

    try:
        with stop_on_signals() as should_stop:
            summary = work(should_stop)
    except RunError as error:
        typer.echo(f"{error}\nwhat is committed is safe; to continue: {again}", err=True)
        raise typer.Exit(SOME_FAILED) from error
    typer.echo(json.dumps(summary.to_json(), indent=2) if as_json else summary.text(again))
    raise typer.Exit(summary.exit_code)
