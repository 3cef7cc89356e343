"""What looks at a corpus and changes nothing in it."""

import json
from typing import Annotated

import typer

from jobs.commands.options import (
    DONE,
    LOOK,
    SOME_FAILED,
    AsJson,
    Overrides,
    RecipeFile,
    Root,
)
from jobs.errors import UserError

commands = typer.Typer()


@commands.command(rich_help_panel=LOOK, epilog="Example: capfilt verify s3://bucket/cc3m --quick")
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


@commands.command(rich_help_panel=LOOK, epilog="Example: capfilt why cc3m-corpus 000420013")
def why(
    root: Root,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The sample's key.")],
    source: Annotated[
        str | None, typer.Option(help="Of one source, where several have the key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell one sample's whole story: its URL, its captions and scores, and every decision."""
    from jobs.corpus_root import open_corpus
    from pipeline.why import KeyNotFoundError, tell

    try:
        story = tell(open_corpus(root), key, source)
    except KeyNotFoundError as error:
        raise UserError(str(error)) from error
    typer.echo(json.dumps(story.to_json(), indent=2) if as_json else "\n".join(story.lines()))


@commands.command(
    rich_help_panel=LOOK, epilog="Example: capfilt report cc3m-corpus --compare cc3m-blip2"
)
def report(
    root: Root,
    compare: Annotated[
        str | None, typer.Option(metavar="ROOT", help="Another corpus to set it against.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page to look at, its numbers as JSON and a dataset card, of a corpus in any state."""
    from dataclasses import asdict

    from jobs.corpus_root import open_corpus
    from pipeline.report.build import build_report

    other = None if compare is None else open_corpus(compare)
    try:
        paths = asdict(build_report(open_corpus(root), compare=other))
    except ValueError as error:
        raise UserError(f"{root}: {error}") from error
    lines = (f"{what:<10}{path}" for what, path in paths.items())
    typer.echo(json.dumps(paths, indent=2) if as_json else "\n".join(lines))


@commands.command(
    rich_help_panel=LOOK, epilog="Example: capfilt calibrate cc3m.yaml --precision 0.95"
)
def calibrate(
    recipe: RecipeFile,
    sets: Overrides = None,
    labels: Annotated[
        str | None, typer.Option(help="A CSV, Parquet or JSONL table of captions looked at.")
    ] = None,
    precision: Annotated[
        float, typer.Option(min=0, max=1, help="Suggest thresholds that reach it.")
    ] = 0.95,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Suggest thresholds that keep this share.")
    ] = 0.5,
    shuffled: Annotated[
        bool, typer.Option(help="Also score captions with images that are not theirs.")
    ] = True,
) -> None:
    """Measure how well each score tells right captions from wrong ones; suggest thresholds."""
    from jobs.calibrate import calibrate_corpus
    from jobs.recipe import load_recipe
    from pipeline.report.calibrate import CalibrationConfig

    config = CalibrationConfig(wanted_precision=precision, wanted_share=share)
    found = calibrate_corpus(load_recipe(recipe, sets or ()), labels, config, is_shuffled=shuffled)
    typer.echo("\n".join(found.lines()))
