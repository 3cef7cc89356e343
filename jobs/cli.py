"""The command line: exit code 0 when all is done, 1 when shards failed, 2 for a wrong recipe."""

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from jobs.errors import UserError

if TYPE_CHECKING:  # a command imports what it needs, so that --help and schema are instant
    from jobs.summary import RunSummary

# img2dataset imports albumentations, which asks the network for news unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

DONE, SOME_FAILED, WRONG_INPUT = 0, 1, 2
# What a disk or an account may refuse, through no fault of the code.
_THE_MACHINES = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
_BUILD, _LOOK, _START = "Build a corpus, in this order", "Look at a corpus", "Start here"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A list of image URLs in, a cleaned image-caption corpus out. Every command may be killed "
    "and given again: it continues.",
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Root = Annotated[str, typer.Argument(metavar="ROOT", help="The corpus: a folder or fsspec URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print recipe and plan, do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


@app.command(rich_help_panel=_START, epilog="Example: capfilt demo --quick")
def demo(
    root: Annotated[Path, typer.Option(help="Folder of the web and of the corpus.")] = Path(
        "capfilt-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller web.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the job on a synthetic, noisy web that is served on this machine."""
    from jobs.demo.job import run_demo
    from jobs.stop import stop_on_signals

    with stop_on_signals() as should_stop:
        summary = run_demo(root, is_quick=quick, should_stop=should_stop)
    typer.echo(json.dumps(summary.to_json(), indent=2) if as_json else summary.text())
    raise typer.Exit(summary.exit_code)


@app.command(rich_help_panel=_START, epilog="Example: capfilt schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check them."""
    from jobs.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command(
    rich_help_panel=_BUILD, epilog="Example: capfilt run cc3m.yaml --set root=s3://bucket/cc3m"
)
def run(
    recipe: RecipeFile, sets: Overrides = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Make all that is missing of a recipe's corpus: every stage that exists so far."""
    _download(recipe, sets, dry_run, as_json)


@app.command(
    rich_help_panel=_BUILD, epilog="Example: capfilt download cc3m.yaml --set root=cc3m --dry-run"
)
def download(
    recipe: RecipeFile, sets: Overrides = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Fetch the images of every source into raw shards, with a verdict for every row."""
    _download(recipe, sets, dry_run, as_json)


@app.command(rich_help_panel=_BUILD, epilog="Example: capfilt retry cc3m.yaml --only transient")
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
    _end(summary, recipe, as_json)


@app.command(rich_help_panel=_LOOK, epilog="Example: capfilt verify s3://bucket/cc3m --quick")
def verify(
    root: Root,
    quick: Annotated[
        bool, typer.Option("--quick", help="Markers, sizes and counts only; opens no data file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Re-hash and recount a corpus; one line for each fault, and how to mend it."""
    from jobs.verify import verify_corpus

    raise typer.Exit(DONE if verify_corpus(root, is_quick=quick, as_json=as_json) else SOME_FAILED)


def _download(recipe: str, sets: list[str] | None, dry_run: bool, as_json: bool) -> None:
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
    _end(summary, recipe, as_json)


def _end(summary: "RunSummary", recipe: str, as_json: bool) -> None:
    typer.echo(json.dumps(summary.to_json(), indent=2) if as_json else summary.text(recipe))
    raise typer.Exit(summary.exit_code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; the entry point of `capfilt`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(args=arguments)
    except UserError as error:
        typer.echo(error, err=True)
        sys.exit(WRONG_INPUT)
    except OSError as error:
        if error.errno not in _THE_MACHINES:
            raise  # a bug, to be seen whole
        typer.echo(f"{error}; what is committed is safe, the same command continues", err=True)
        sys.exit(SOME_FAILED)
    sys.exit(DONE)
