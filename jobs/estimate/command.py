"""`capfilt plan`, in order: the recipe, the cluster, the rates, the reckoning, the table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import typer
import yaml

from jobs.cluster_file import load_cluster_file
from jobs.estimate.estimate import estimate
from jobs.estimate.rates import Rates, dump_rates, load_rates
from jobs.estimate.table import plan_json, plan_text
from jobs.estimate.work import work_of
from jobs.hub_models import hub_models, unpinned
from jobs.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class Question:
    """What was typed."""

    recipe: str
    cluster: str
    sets: Sequence[str] = ()
    rates: Sequence[str] = ()
    """Files, and single rates as KEY=VALUE; the last of equal keys wins."""
    probe_rows: int = 0
    is_rehearsal: bool = False


def answer(question: Question, *, as_json: bool = False) -> str:
    """Return the plan, as Markdown or as one JSON document.

    Raises UserError for a wrong recipe, cluster file or rate, and lists that nobody can count.
    """
    recipe = load_recipe(question.recipe, question.sets, is_rehearsal=question.is_rehearsal)
    cluster = load_cluster_file(question.cluster)
    rates = load_rates(question.rates)
    if question.probe_rows:
        rates = _probed(recipe, rates, question.probe_rows)
    for line in unpinned(hub_models(recipe)):
        typer.echo(line, err=True)
    done = estimate(work_of(recipe, rates.rows), cluster, rates)
    return json.dumps(plan_json(done), indent=2) if as_json else plan_text(done)


def measure(recipe: str, sets: Sequence[str], num_rows: int) -> str:
    """Return measured rates as YAML that `load_rates` reads. Raises UserError as `probe` does."""
    rates = _probed(load_recipe(recipe, sets), Rates(), num_rows)
    return str(yaml.safe_dump(dump_rates(rates), sort_keys=False))


def _probed(recipe: Recipe, rates: Rates, num_rows: int) -> Rates:
    # It brings what the stages need, which reckoning does without.
    from jobs.estimate.probe import probe

    return probe(recipe, rates, num_rows, lambda line: typer.echo(line, err=True))
