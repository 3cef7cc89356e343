"""Typed recipes: YAML plus `--set a.b=c` become one frozen model, or an error to act on."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from jobs.errors import RecipeError
from jobs.evaluation.config import AblationConfig, EvaluationConfig
from jobs.rehearsal import RehearsalConfig, rehearsed
from jobs.run_config import RunConfig
from jobs.training.config import STAGES, TrainingConfig
from jobs.yaml_lines import LocatedYaml, parse_yaml
from pipeline.download import DownloadConfig
from pipeline.model_configs import CaptionerConfig, ScorerConfig
from pipeline.score_config import ScoreConfig
from pipeline.selection.config import SelectConfig
from pipeline.sources.config import SourceConfig
from pipeline.web.config import FetchConfig

MAX_RECIPE_BYTES = 1_000_000


class Recipe(BaseModel):
    """Everything that decides a run's output. Same recipe, seed and inputs: the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = Field(
        description="Name of the run: lower-case letters, digits, dot, dash and underscore."
    )
    root: Annotated[str, Field(min_length=1)] = Field(
        description="Where the corpus is written: a folder or an fsspec URL (s3://, gs://)."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=42, description="Seed of everything that is drawn at random."
    )
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = Field(
        description="The lists of images to read, each with a name of its own."
    )
    fetch: FetchConfig = Field(
        default_factory=FetchConfig, description="Who may be called, how much and how long."
    )
    download: DownloadConfig = Field(
        default_factory=DownloadConfig, description="What becomes of a downloaded image."
    )
    captioner: CaptionerConfig | None = Field(
        default=None,
        description="The captioner and how it decodes; the name 'trained' is this run's own.",
    )
    scorer: ScorerConfig | None = Field(
        default=None,
        description="The models that score captions; the filter named 'trained' is this run's own.",
    )
    score: ScoreConfig = Field(
        default_factory=ScoreConfig, description="How images are read for captioner and scorer."
    )
    select: SelectConfig | None = Field(
        default=None, description="Which captions are kept; without it nothing is selected."
    )
    training: TrainingConfig | None = Field(
        default=None, description="How models are trained on the corpus."
    )
    evaluation: EvaluationConfig | None = Field(
        default=None, description="On which source, kept from training, models are measured."
    )
    ablation: AblationConfig = Field(
        default_factory=AblationConfig,
        description="The proof that cleaning helps: one small model, trained on several arms.",
    )
    run: RunConfig = Field(
        default_factory=RunConfig, description="Workers, resources and patience; pace alone."
    )
    rehearsal: RehearsalConfig | None = Field(
        default_factory=RehearsalConfig,
        description="What --rehearsal makes of the recipe; null in one that is a rehearsal.",
    )

    def content(self) -> dict[str, Any]:
        """Return what decides the raw shards' bytes: all but name, place, pace and patience.

        Scores, selection and training have fingerprints of their own, so that they can be done
        again with other settings.
        """
        return {
            "seed": self.seed,
            "sources": {each.name: each.content() for each in self.sources},
            "fetch": self.fetch.content(),
            "download": self.download.content(),
        }


def load_recipe(path: str, overrides: Sequence[str] = (), *, is_rehearsal: bool = False) -> Recipe:
    """Read a YAML recipe and apply overrides of the form `a.b=c`, the last of equal keys winning.

    What is asked for to be a rehearsal is made one after that, so that the same overrides give the
    same recipe but smaller, and beside the run's root. Raises RecipeError with one line for each
    problem: file and line, key, value, reason, and the nearest valid key when the key is unknown.
    """
    document = parse_yaml(_read(path), path)
    for override in overrides:
        _apply_override(document, override)
    recipe = _validated(document, path)
    return _rehearsed(recipe, path) if is_rehearsal else recipe


def _rehearsed(recipe: Recipe, path: str) -> Recipe:
    config = recipe.rehearsal
    if config is None:
        raise RecipeError(f"{path}: rehearsal is null: this is a rehearsal's recipe already")
    document = LocatedYaml(_document(rehearsed(recipe, config)), path)
    for key, value in config.overrides.items():
        _put(document, key.split("."), value, f"{path}: rehearsal.overrides.{key}")
    return _validated(document, path)


def _validated(document: LocatedYaml, path: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        problems = [_describe(problem, document) for problem in error.errors(include_url=False)]
        raise RecipeError("\n".join(problems)) from None
    _check_source_names(recipe, path)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return the fully resolved recipe as YAML that `load_recipe` reads back to an equal recipe.

    A stage of training has a section there if it has one here: to have one is to be asked for.
    """
    # ASCII with escapes: left as they are, some line separators would be folded into spaces.
    return yaml.safe_dump(_document(recipe), sort_keys=False)


def _document(recipe: Recipe) -> dict[str, Any]:
    document = recipe.model_dump(mode="json")
    if recipe.training is not None:
        for stage in set(STAGES) - recipe.training.model_fields_set:
            del document["training"][stage]
    return document


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema that editors use to complete and check recipes."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "capfilt recipe"
    return schema


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES:,} bytes; is this a recipe?")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; is this a recipe?") from error


def _check_source_names(recipe: Recipe, path: str) -> None:
    names = [source.name for source in recipe.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{path}: sources: the name {twice[0]!r} is used twice; rename one")


# --- overrides --------------------------------------------------------------------------------


def _apply_override(document: LocatedYaml, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"--set {override}: not of the form key=value, e.g. --set download.min_side_px=256"
        )
    value = parse_yaml(text, f"--set {key}", mapping=False).data
    _put(document, parts, value, f"--set {override}")
    document.lines[tuple(parts)] = f"--set {key}"


def _put(document: LocatedYaml, parts: Sequence[str], value: object, shown: str) -> None:
    """Set a key; `shown` is what errors call the setting."""
    holder: Any = document.data
    for position, part in enumerate(parts[:-1]):
        holder = _step(holder, part, shown, ".".join(parts[:position]))
    if isinstance(holder, list):
        holder[_index(holder, parts[-1], shown)] = value
    elif isinstance(holder, dict):
        holder[parts[-1]] = value
    else:
        raise RecipeError(f"{shown}: {'.'.join(parts[:-1])} is a value, not a section")
    document.lines[tuple(parts)] = shown


def _step(holder: Any, part: str, shown: str, so_far: str) -> Any:  # noqa: ANN401 (YAML)
    if isinstance(holder, list):
        return holder[_index(holder, part, shown)]
    if not isinstance(holder, dict):
        raise RecipeError(f"{shown}: {so_far} is a value, not a section")
    if holder.get(part) is None:
        holder[part] = {}
    return holder[part]


def _index(items: list[Any], part: str, shown: str) -> int:
    """Find a list item by its position or by its `name`, so that `sources.cc3m.paths` works."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names if name) or f"0 to {len(items) - 1}"
    raise RecipeError(f"{shown}: no item {part!r} in the list; there is: {known}")


# --- what is wrong, where, and what was probably meant ------------------------------------------


def _describe(problem: ErrorDetails, document: LocatedYaml) -> str:
    location = tuple(str(part) for part in problem["loc"])
    key = ".".join(location)
    where = document.where(location)
    if problem["type"] == "extra_forbidden":
        hint = _nearest_key(location)
        return f"{where}: {key} = {_short(problem['input'])}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{where}: {key}: missing; it has no default"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {key or 'the recipe'} = {_short(problem['input'])}: {reason}"


def _short(value: Any) -> str:  # noqa: ANN401 (YAML)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest_key(location: tuple[str, ...]) -> str:
    siblings = [path for path in _valid_keys(Recipe) if path[:-1] == _unindexed(location)[:-1]]
    near = difflib.get_close_matches(location[-1], [path[-1] for path in siblings], n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    # Of keys with the same name the one that is nearest to the top.
    deepest_first = sorted(_valid_keys(Recipe), key=len, reverse=True)
    elsewhere = {path[-1]: ".".join(path) for path in deepest_first}
    near = difflib.get_close_matches(location[-1], list(elsewhere), n=1, cutoff=0.7)
    if near:
        return f"; did you mean {elsewhere[near[0]]!r}?"
    return "; valid here: " + ", ".join(sorted(path[-1] for path in siblings))


def _unindexed(location: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in location if not part.isdecimal())


def _valid_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for inner in _models_in(field.annotation):
            yield from _valid_keys(inner, (*prefix, name))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401 (a type form)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
