"""What all commands share: their options, their panels in --help, and exit codes."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # a command imports what it needs, so that --help and schema are instant
    from jobs.recipe import Recipe
    from jobs.training.config import Stage

DONE, SOME_FAILED, WRONG_INPUT = 0, 1, 2
START, BUILD, TRAIN, LOOK, CLUSTER = (
    "Start here",
    "Build a corpus, in this order",
    "Train and prove, in this order",
    "Look at a corpus",
    "On a cluster",
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Root = Annotated[str, typer.Argument(metavar="ROOT", help="The corpus: a folder or fsspec URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print recipe and plan, do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
Rehearsal = Annotated[
    bool,
    typer.Option(
        "--rehearsal",
        help="The same with a thousandth of rows and steps, into ROOT-rehearsal; see `rehearsal` "
        "in the recipe.",
    ),
]


def warn_of_moving_models(recipe: "Recipe", *stages: "Stage") -> None:
    """Say which models of a recipe, or of these stages, are no commit of the hub's: those move."""
    from jobs.hub_models import hub_models, unpinned
    from jobs.training.config import STAGES

    for line in unpinned(hub_models(recipe, stages or STAGES)):
        typer.echo(line, err=True)


def as_rehearsal(rehearsal: bool) -> tuple[str, ...]:
    """Return the flag as it was typed, if it was."""
    return ("--rehearsal",) if rehearsal else ()


def as_typed(command: str, recipe: str, sets: list[str] | None, *others: str) -> str:
    """Return the line that gives a command again, ready to be pasted into a shell."""
    overrides = [f"--set={each}" for each in sets or ()]
    return shlex.join(["capfilt", command, recipe, *overrides, *others])
