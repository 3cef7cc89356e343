"""The stages that build a corpus, from URLs to raw shards and beyond."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import BUILD, AsJson, DryRun, Overrides, RecipeFile, as_typed
from jobs.errors import UserError

if TYPE_CHECKING:  # a command imports what it needs, so that --help and schema are instant
    from jobs.summary import RunSummary

commands = typer.Typer()


@commands.command(
    rich_help_panel=BUILD, epilog="Example: capfilt run cc3m.yaml --set root=s3://bucket/cc3m"
)
def run(
    recipe: RecipeFile, sets: Overrides = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Make all that is missing of a recipe's corpus: every stage that exists so far."""
    _download("run", recipe, sets, dry_run, as_json)


@commands.command(
    rich_help_panel=BUILD, epilog="Example: capfilt download cc3m.yaml --set root=cc3m --dry-run"
)
def download(
    recipe: RecipeFile, sets: Overrides = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Fetch the images of every source into raw shards, with a verdict for every row."""
    _download("download", recipe, sets, dry_run, as_json)


@commands.command(rich_help_panel=BUILD, epilog="Example: capfilt retry cc3m.yaml --only transient")
def retry(
    recipe: RecipeFile,
    sets: Overrides = None,
    only: Annotated[
        str, typer.Option(help="Which failed rows: 'transient' or 'all'.", metavar="WHICH")
    ] = "transient",
    as_json: AsJson = False,
) -> None:
    """Visit failed rows of committed shards again, another day; what succeeded is not touched."""
    from jobs import run as jobs_run
    from jobs.recipe import load_recipe
    from jobs.stop import stop_on_signals

    if only not in ("transient", "all"):
        raise UserError(f"--only {only}: neither 'transient' nor 'all'")
    loaded = load_recipe(recipe, sets or ())
    with stop_on_signals() as should_stop:
        summary = jobs_run.retry(loaded, should_stop, is_only_transient=only == "transient")
    _end(summary, as_typed("retry", recipe, sets, f"--only={only}"), as_json)


def _download(
    command: str, recipe: str, sets: list[str] | None, dry_run: bool, as_json: bool
) -> None:
    from jobs import run as jobs_run
    from jobs.recipe import load_recipe
    from jobs.stop import stop_on_signals

    loaded = load_recipe(recipe, sets or ())
    if dry_run:
        from jobs.plan import describe_plan

        typer.echo(describe_plan(loaded, as_json=as_json))
        return
    with stop_on_signals() as should_stop:
        summary = jobs_run.download(loaded, should_stop)
    _end(summary, as_typed(command, recipe, sets), as_json)


def _end(summary: "RunSummary", again: str, as_json: bool) -> None:
    typer.echo(json.dumps(summary.to_json(), indent=2) if as_json else summary.text(again))
    raise typer.Exit(summary.exit_code)
