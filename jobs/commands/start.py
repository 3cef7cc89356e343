"""What one tries first: the demo, and the schema that makes an editor help with recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.options import START, AsJson
from jobs.errors import UserError

commands = typer.Typer()


@commands.command(rich_help_panel=START, epilog="Example: capfilt demo --quick")
def demo(
    root: Annotated[Path, typer.Option(help="Folder of the web and of the corpus.")] = Path(
        "capfilt-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller web, fewer steps, no comparison.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="All four arms of the comparison, with three seeds.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the web and of every model.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the whole job, BLIP-2 included, on a synthetic, noisy web served on this machine."""
    from jobs.demo.job import Extent, run_demo
    from jobs.stop import stop_on_signals

    if quick and full:
        raise UserError("--quick leaves out what --full is for; give one of them")
    extent = Extent.QUICK if quick else Extent.FULL if full else Extent.USUAL
    with stop_on_signals() as should_stop:
        summary = run_demo(root, extent=extent, seed=seed, should_stop=should_stop)
    typer.echo(json.dumps(summary.to_json(), indent=2) if as_json else summary.text())
    raise typer.Exit(summary.exit_code)


@commands.command(rich_help_panel=START, epilog="Example: capfilt schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check them."""
    from jobs.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
