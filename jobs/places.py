"""Whether every machine of a cluster would find what a recipe names under the same name."""

from collections.abc import Iterator
from pathlib import Path

from jobs.errors import UserError
from jobs.recipe import Recipe
from pipeline.model_configs import ModelConfig


def refuse_relative(recipe: Recipe) -> None:
    """Raise UserError for files that are named relative to the folder this machine stands in."""
    for key, place in _places(recipe):
        if "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"{key} = {place}: relative to this machine, so the cluster would not find it; "
                f"give a URL (s3://, gs://) or an absolute path that every node mounts: "
                f"--set {key}=..."
            )


def _places(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "root", recipe.root
    for source in recipe.sources:
        for path in source.paths:
            yield f"sources.{source.name}.paths", path
        for key in ("image_root", "image_data"):
            if value := getattr(source, key):
                yield f"sources.{source.name}.{key}", value
    models: dict[str, ModelConfig | None] = {"captioner": recipe.captioner}
    if recipe.scorer is not None:
        models |= {"scorer.filter": recipe.scorer.filter, "scorer.clip": recipe.scorer.clip}
    for key, model_config in models.items():
        # A name on the hub looks like a relative path, and is one only if there is such a folder.
        if model_config is not None and Path(model_config.name).is_dir():
            yield f"{key}.name", model_config.name
