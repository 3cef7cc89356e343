"""The work of a recipe: rows and shards of each source, and what its models ask of an image."""

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.errors import UserError
from jobs.estimate.flops import captioning_flops, scoring_flops
from jobs.recipe import Recipe
from jobs.run_config import RunConfig
from pipeline.sources.config import SourceConfig
from pipeline.sources.rows import Origin, SourceError
from pipeline.sources.shards import plan_shards


@dataclass(frozen=True, slots=True)
class SourceWork:
    """One source."""

    name: str
    form: str
    num_rows: int
    is_human: bool
    """Its captions are kept as they are, and it gets no synthetic ones."""
    is_counted: bool
    """Whether its lists were read here, or somebody said how many rows they have."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a plan needs of a recipe."""

    name: str
    sources: tuple[SourceWork, ...]
    rows_per_shard: int
    image_px: int
    policy: str
    """How captions are selected; empty when they are not."""
    dtype: str
    captions_per_web_image: int
    flops_per_web_image: float
    """0 when nothing is captioned or scored."""
    flops_per_human_image: float
    models: str
    run: RunConfig

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(each.num_rows for each in self.sources)

    def num_shards(self, source: SourceWork) -> int:
        """Return how many shards a source is cut into."""
        return -(-source.num_rows // self.rows_per_shard)


def work_of(recipe: Recipe, rows: Mapping[str, int]) -> Work:
    """Return the work of a recipe; `rows` stands for lists that cannot be read here.

    Raises UserError where neither tells how many rows a source has.
    """
    captioner, scorer = recipe.captioner, recipe.scorer
    num_synthetic = captioner.num_captions if captioner is not None else 0
    scoring = scoring_flops(scorer, 1 + num_synthetic) if scorer is not None else 0.0
    human = scoring_flops(scorer, 1) if scorer is not None else 0.0
    captioning = captioning_flops(captioner) if captioner is not None else 0.0
    names = [captioner.name if captioner else ""]
    if scorer is not None:
        names += [each.name for each in (scorer.filter, scorer.clip) if each is not None]
    return Work(
        name=recipe.name,
        sources=tuple(
            _source(each, recipe.download.rows_per_shard, rows) for each in recipe.sources
        ),
        rows_per_shard=recipe.download.rows_per_shard,
        image_px=recipe.download.image_size_px,
        policy=recipe.select.policy.value if recipe.select is not None else "",
        dtype=recipe.score.dtype,
        captions_per_web_image=1 + num_synthetic,
        flops_per_web_image=captioning + scoring,
        flops_per_human_image=human,
        models=", ".join(filter(None, names)),
        run=recipe.run,
    )


def _source(config: SourceConfig, rows_per_shard: int, rows: Mapping[str, int]) -> SourceWork:
    given = rows.get(config.name)
    if given is None:
        try:
            shards = plan_shards(config, records_per_shard=rows_per_shard)
            counted = sum(shard.num_records for shard in shards)
        except (SourceError, OSError) as error:
            raise UserError(
                f"source {config.name}: {error}; to plan without its lists, say how many rows they "
                f"have: --rates rows.{config.name}=1000000"
            ) from error
    return SourceWork(
        name=config.name,
        form=config.format.value,
        num_rows=counted if given is None else -(-given // config.one_in),
        is_human=config.origin is Origin.HUMAN,
        is_counted=given is None,
    )
