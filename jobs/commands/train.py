"""Training, from a corpus to models."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.options import (
    SOME_FAILED,
    TRAIN,
    AsJson,
    DryRun,
    Overrides,
    RecipeFile,
    Rehearsal,
    Root,
    as_rehearsal,
    as_typed,
    warn_of_moving_models,
)
from jobs.errors import UserError
from jobs.training.config import STAGES, Stage

if TYPE_CHECKING:  # a command imports what it needs, so that --help and schema are instant
    from jobs.training.exports import ExportCard
    from jobs.training.job import TrainingJob

commands = typer.Typer()
StageName = Annotated[
    str, typer.Option("--stage", metavar="STAGE", help=f"Which: {', '.join(STAGES)}.")
]


@commands.command(
    rich_help_panel=TRAIN, epilog="Example: capfilt pretrain cc3m.yaml --stage stage1"
)
def pretrain(
    recipe: RecipeFile,
    stage: StageName,
    sets: Overrides = None,
    rehearsal: Rehearsal = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train one stage on the corpus, from its last checkpoint on, to an export."""
    from jobs.pretrain import pretrain as train_stage
    from jobs.recipe import load_recipe
    from jobs.stop import stop_on_signals
    from jobs.training.job import training_job

    name = _stage(stage)
    loaded = load_recipe(recipe, sets or (), is_rehearsal=rehearsal)
    warn_of_moving_models(loaded.model_copy(update={"captioner": None, "scorer": None}), name)
    job = training_job(loaded.model_copy(update={"root": _absolute(loaded.root)}), name)
    if dry_run:
        typer.echo(_describe(job, as_json))
        return
    with stop_on_signals() as should_stop:
        card = train_stage(job, should_stop)
    if card is None:
        flags = (f"--stage={name}", *as_rehearsal(rehearsal))
        again = as_typed("pretrain", recipe, sets, *flags)
        typer.echo(f"stopped; the checkpoint is written, to go on:\n  {again}", err=True)
        raise typer.Exit(SOME_FAILED)
    typer.echo(_summary(job, card, as_json))


@commands.command(
    rich_help_panel=TRAIN, epilog="Example: capfilt evaluate cc3m.yaml --stage stage1"
)
def evaluate(
    recipe: RecipeFile,
    stage: StageName,
    sets: Overrides = None,
    rehearsal: Rehearsal = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained stage on the held-out source: retrieval and captions."""
    from jobs.evaluate import evaluate as measure
    from jobs.recipe import load_recipe

    loaded = load_recipe(recipe, sets or (), is_rehearsal=rehearsal)
    done = measure(loaded, _stage(stage))
    typer.echo(json.dumps(done.to_json(), indent=2) if as_json else done.text())


@commands.command(rich_help_panel=TRAIN, epilog="Example: capfilt ablate cc3m.yaml")
def ablate(
    recipe: RecipeFile,
    sets: Overrides = None,
    rehearsal: Rehearsal = False,
    as_json: AsJson = False,
) -> None:
    """Prove that cleaning helps: train the same model on web, filtered, captioned and CapFilt."""
    from jobs.ablate import ablate as prove
    from jobs.recipe import load_recipe
    from jobs.stop import stop_on_signals

    loaded = load_recipe(recipe, sets or (), is_rehearsal=rehearsal)
    with stop_on_signals() as should_stop:
        done = prove(loaded.model_copy(update={"root": _absolute(loaded.root)}), should_stop)
    if done is None:
        again = as_typed("ablate", recipe, sets, *as_rehearsal(rehearsal))
        typer.echo(f"stopped; what is trained is kept, to go on:\n  {again}", err=True)
        raise typer.Exit(SOME_FAILED)
    typer.echo(json.dumps(done.to_json(), indent=2) if as_json else done.text())


@commands.command(
    rich_help_panel=TRAIN, epilog="Example: capfilt export cc3m-corpus --stage stage1 --out qformer"
)
def export(
    root: Root,
    stage: StageName,
    out: Annotated[Path, typer.Option(help="A new folder to write.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="'hf' or 'lavis'.")] = "hf",
) -> None:
    """Write a trained stage as transformers or LAVIS load it, with a model card."""
    from jobs.export import export as write

    if to not in ("hf", "lavis"):
        raise UserError(f"--to {to}: neither 'hf' nor 'lavis'")
    names = write(root, _stage(stage), out, "hf" if to == "hf" else "lavis")
    typer.echo("\n".join(f"{out}/{name}" for name in names))


def _stage(name: str) -> Stage:
    for stage in STAGES:
        if name == stage:
            return stage
    raise UserError(f"--stage {name}: none of {', '.join(STAGES)}")


def _absolute(root: str) -> str:
    """Return a root that workers find, which start in folders of their own."""
    return root if "://" in root else str(Path(root).absolute())


def _describe(job: "TrainingJob", as_json: bool) -> str:
    from dataclasses import asdict

    from jobs.training.data import num_pairs
    from jobs.training.plan import plan_stage

    pairs = num_pairs(job)
    plan = plan_stage(job.stage, job.section, pairs)
    facts: dict[str, Any] = {
        "stage": job.stage,
        "pairs_per_epoch": pairs,
        "global_batch_size": plan.global_batch_size,
        "num_steps": plan.num_steps,
        "schedule": {"kind": type(plan.schedule).__name__, **asdict(plan.schedule)},  # type: ignore[call-overload]
    }
    if as_json:
        return json.dumps(facts, indent=2)
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _summary(job: "TrainingJob", card: "ExportCard", as_json: bool) -> str:
    place = job.open_store().full(f"{job.folder}/export")
    facts = {"stage": card.stage, "steps": card.step, "export": place}
    facts |= {"losses": card.losses, "probes": card.probes}
    if as_json:
        return json.dumps(facts, indent=2)
    numbers = {**card.losses, **card.probes}
    lines = [f"{card.stage}: {card.step:,} steps, export in {place}"]
    lines += [f"  {name:<22}{value:>10.4f}" for name, value in numbers.items()]
    return "\n".join(lines)
