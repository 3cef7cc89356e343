"""Runs on a cluster: handed over, watched, stopped, and reckoned beforehand."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import (
    CLUSTER,
    DONE,
    AsJson,
    Overrides,
    RecipeFile,
    Rehearsal,
    Root,
    as_rehearsal,
    as_typed,
    warn_of_moving_models,
)

if TYPE_CHECKING:  # a command imports what it needs, so that --help and schema are instant
    from jobs.job_server import Attempt, JobServer
    from jobs.summary import RunSummary

INTERRUPTED = 130
commands = typer.Typer()

Address = Annotated[
    str,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS"],
        help="The head's dashboard, as a rule the near end of an SSH tunnel.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The recipe's `name`.")]
_HERE = "http://127.0.0.1:8265"


@commands.command(
    rich_help_panel=CLUSTER, epilog="Example: capfilt submit cc3m.yaml --set root=s3://bucket/cc3m"
)
def submit(
    recipe: RecipeFile,
    sets: Overrides = None,
    address: Address = _HERE,
    rehearsal: Rehearsal = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log until the run ends.")
    ] = True,
) -> None:
    """Run a recipe on a cluster; given again it attaches, or continues what ended or died."""
    from jobs.job_server import JobServer
    from jobs.recipe import load_recipe
    from jobs.submit import submit_run

    place = () if address == _HERE else ("--address", address)
    again = as_typed("submit", recipe, sets, *place, *as_rehearsal(rehearsal))
    loaded = load_recipe(recipe, sets or (), is_rehearsal=rehearsal)
    warn_of_moving_models(loaded)
    server = JobServer(address)
    done = submit_run(server, loaded, again)
    attempt = done.attempt
    if done.is_new:
        typer.echo(f"run {attempt.run}: attempt {attempt.number} submitted to {server.address}")
    else:
        typer.echo(f"run {attempt.run}: attempt {attempt.number} is {attempt.status}; attached")
    if done.note:
        typer.echo(done.note)
    typer.echo(f"how far it is, with or without a head: capfilt status {attempt.root}")
    if wait:
        _follow(server, attempt, again)


@commands.command("run-submitted", hidden=True)
def run_submitted(
    recipe: RecipeFile, again: Annotated[str, typer.Option(help="What was typed to submit it.")]
) -> None:
    """Be the driver of a submitted run, on the head; what continues it is to submit it again."""
    from jobs.commands.data import finish
    from jobs.corpus_root import open_corpus
    from jobs.recipe import load_recipe
    from jobs.takeover import wait_for_silence

    loaded = load_recipe(recipe)
    wait_for_silence(open_corpus(loaded.root), threading.Event())

    def work(should_stop: Callable[[], bool]) -> "RunSummary":
        from jobs.whole import run_whole

        return run_whole(loaded, should_stop, command=again)

    finish(work, again, as_json=False)


@commands.command(rich_help_panel=CLUSTER, epilog="Example: capfilt status s3://bucket/cc3m")
def status(root: Root, as_json: AsJson = False) -> None:
    """Tell how far a run is, from the corpus alone: right even when no head is left."""
    from jobs.status import status_text

    typer.echo(status_text(root, as_json=as_json))


@commands.command(rich_help_panel=CLUSTER, epilog="Example: capfilt logs cc3m -f")
def logs(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends.")
    ] = False,
    address: Address = _HERE,
) -> None:
    """Print the log of a run's latest attempt on a head."""
    from jobs.job_server import JobServer
    from jobs.submit import last_attempt

    server = JobServer(address)
    attempt = last_attempt(server, run)
    if follow and attempt.is_active:
        _follow(server, attempt, f"capfilt logs {run} -f")
    typer.echo(server.log(attempt.id), nl=False)


@commands.command(rich_help_panel=CLUSTER, epilog="Example: capfilt stop cc3m")
def stop(run: RunName, address: Address = _HERE) -> None:
    """Have a run finish what it holds and end; submitting it again continues."""
    from jobs.job_server import JobServer
    from jobs.submit import stop_run

    attempt = stop_run(JobServer(address), run)
    typer.echo(f"run {run}: attempt {attempt.number} {attempt.status}; to continue: submit again")


@commands.command("list", rich_help_panel=CLUSTER, epilog="Example: capfilt list")
def list_(address: Address = _HERE) -> None:
    """List the runs that a head knows of."""
    from jobs.job_server import JobServer
    from jobs.submit import list_text

    typer.echo(list_text(JobServer(address)))


@commands.command(
    rich_help_panel=CLUSTER, epilog="Example: capfilt plan cc3m.yaml --cluster ray_cluster.yaml"
)
def plan(  # noqa: PLR0913 - an option of the command line is an argument
    recipe: RecipeFile,
    cluster: Annotated[str, typer.Option(metavar="FILE", help="A Ray cluster file with prices.")],
    sets: Overrides = None,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|KEY=VALUE",
            help="What you know: a file of `capfilt probe`, or e.g. rows.laion=115000000.",
        ),
    ] = None,
    probe_rows: Annotated[
        int, typer.Option("--probe", min=0, help="Measure first, with so many rows a source.")
    ] = 0,
    rehearsal: Rehearsal = False,
    as_json: AsJson = False,
) -> None:
    """Reckon what a run will take on a cluster: hours, GPU-hours, TB, money, survivors.

    Nothing is made. What the next `capfilt run` would do is `capfilt run --dry-run`.
    """
    from jobs.estimate.command import Question, answer

    given = tuple(sets or ()), tuple(rates or ())
    question = Question(recipe, cluster, *given, probe_rows, rehearsal)
    typer.echo(answer(question, as_json=as_json))


@commands.command(
    rich_help_panel=CLUSTER, epilog="Example: capfilt probe cc3m.yaml --rows 300 > rates.yaml"
)
def probe(
    recipe: RecipeFile,
    sets: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each source.")] = 300,
) -> None:
    """Measure rates for `plan`: the first rows of every source through all stages, here."""
    from jobs.estimate.command import measure

    typer.echo(measure(recipe, tuple(sets or ()), rows), nl=False)


def _follow(server: "JobServer", attempt: "Attempt", again: str) -> None:
    """End the command as the run ends; Ctrl-C only looks away."""
    from jobs.submit import follow_run

    try:
        code = follow_run(server, attempt)
    except KeyboardInterrupt:
        typer.echo(f"\nthe run goes on; to look again: capfilt logs {attempt.run} -f", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if code != DONE:
        typer.echo(f"the run ended with code {code}; to continue: {again}", err=True)
    raise typer.Exit(code)
