"""What a run would do: which shards there are, which exist, where the others will be written."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.catalogue import Catalogue
from jobs.corpus_root import open_corpus
from jobs.durable import count_shards
from jobs.errors import UserError
from jobs.recipe import Recipe, dump_recipe
from jobs.stages.stage import Commit
from pipeline.corpus import Corpus
from pipeline.download import STAGE
from pipeline.sources.config import SourceConfig
from pipeline.sources.rows import SourceError
from pipeline.sources.shards import SourceShard, plan_shards


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """One source cut into shards, and those of them that exist."""

    config: SourceConfig
    shards: tuple[SourceShard, ...]
    done: Mapping[int, Commit]

    @property
    def missing(self) -> Iterator[SourceShard]:
        """The shards to be made, in order."""
        return (shard for shard in self.shards if shard.index not in self.done)

    @property
    def committed(self) -> Iterator[SourceShard]:
        """The shards that exist, in order."""
        return (shard for shard in self.shards if shard.index in self.done)

    @property
    def num_records(self) -> int:
        """Rows of the source, malformed ones included."""
        return sum(shard.num_records for shard in self.shards)


def plan_run(recipe: Recipe, catalogue: Catalogue) -> list[SourcePlan]:
    """Cut every source into shards and look up which of them exist; writes nothing.

    Raises UserError when a source cannot be read.
    """
    return [_plan_source(recipe, catalogue, config) for config in recipe.sources]


def describe_plan(recipe: Recipe, *, as_json: bool = False) -> str:
    """Return the fully resolved recipe and the plan; reads lists and markers, writes nothing."""
    corpus = open_corpus(recipe.root)
    plans = plan_run(recipe, Catalogue.load(corpus))
    if as_json:
        return json.dumps(_to_json(recipe, corpus, plans), indent=2)
    return dump_recipe(recipe) + "\n" + "\n".join(_lines(recipe, corpus, plans))


def _lines(recipe: Recipe, corpus: Corpus, plans: list[SourcePlan]) -> Iterator[str]:
    yield f"# The plan: stages in order, all below {corpus.root}"
    for plan in plans:
        yield (
            f"# download {plan.config.name}: {plan.num_records:,} rows in {len(plan.shards):,} "
            f"shards of up to {recipe.download.rows_per_shard:,}, {len(plan.done):,} of them done"
            f" -> {STAGE}/{plan.config.name}/"
        )
    for name, folder in _later_stages(recipe):
        counts = count_shards(corpus, folder)
        for plan in plans:
            source, num_done = plan.config.name, counts.get(plan.config.name, 0)
            yield (
                f"# {name} {source}: {len(plan.shards):,} shards, {num_done:,} of them done"
                f" -> {folder}/{source}/"
            )


def _later_stages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield name and folder of each stage that the recipe asks for behind the download."""
    if recipe.captioner or recipe.scorer or recipe.select:
        yield "score", "captions"
    if recipe.select:
        yield "select", "clean"


def _to_json(recipe: Recipe, corpus: Corpus, plans: list[SourcePlan]) -> dict[str, Any]:
    stages = [
        {
            "stage": "download",
            "source": plan.config.name,
            "rows": plan.num_records,
            "shards": len(plan.shards),
            "shards_done": len(plan.done),
            "writes_to": f"{corpus.root}/{STAGE}/{plan.config.name}",
        }
        for plan in plans
    ]
    stages += [
        {
            "stage": name,
            "source": plan.config.name,
            "rows": plan.num_records,
            "shards": len(plan.shards),
            "shards_done": counts.get(plan.config.name, 0),
            "writes_to": f"{corpus.root}/{folder}/{plan.config.name}",
        }
        for name, folder in _later_stages(recipe)
        for counts in [count_shards(corpus, folder)]
        for plan in plans
    ]
    return {"recipe": recipe.model_dump(mode="json"), "root": corpus.root, "stages": stages}


def _plan_source(recipe: Recipe, catalogue: Catalogue, config: SourceConfig) -> SourcePlan:
    try:
        shards = tuple(plan_shards(config, records_per_shard=recipe.download.rows_per_shard))
    except SourceError as error:
        raise UserError(f"source {config.name}: {error}") from error
    done = catalogue.of(STAGE, config.name)
    _refuse_other_lists(config.name, shards, done)
    return SourcePlan(config, shards, done)


def _refuse_other_lists(
    source: str, shards: tuple[SourceShard, ...], done: Mapping[int, Commit]
) -> None:
    """Raise UserError where the shards that exist cannot have come from these lists."""
    for index, commit in sorted(done.items()):
        planned = shards[index].num_records if index < len(shards) else 0
        if commit.num_rows != planned:
            raise UserError(
                f"source {source}: shard {STAGE}/{source}/{index:05d} was made from "
                f"{commit.num_rows:,} rows, its lists now give it {planned:,}; give back the "
                "lists that the corpus was begun with, or write to another root"
            )
