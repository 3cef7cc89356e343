"""What looks at a corpus and changes nothing in it."""

from typing import Annotated

import typer

from jobs.commands.options import DONE, LOOK, SOME_FAILED, AsJson, Root

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
