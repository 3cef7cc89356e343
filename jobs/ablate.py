"""`capfilt ablate`: does cleaning help on your data? (BLIP, Table 1)

From one scored corpus, several are selected; the same small model is trained on each, with the same
steps and seeds, and measured on the same images that none has seen. Every arm is a corpus of its
own below `<root>/ablation`, with the images of the first by hard link.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.evaluate import evaluate
from jobs.evaluation.config import Arm
from jobs.pretrain import pretrain
from jobs.recipe import Recipe
from jobs.training.config import TRAINED, Stage
from jobs.training.context import this_process
from jobs.training.data import VOCABULARY, open_tokenizer
from jobs.training.job import training_job
from jobs.training.side_by_side import Task, side_by_side
from pipeline.corpus import Corpus
from pipeline.select import Selector
from pipeline.selection.config import Policy, SelectConfig
from pipeline.share import share_shard, share_upstream
from pipeline.sources.rows import Origin

RESULT = "report/ablation.json"
Figures = dict[str, float]
_POLICIES: dict[Arm, Policy] = {
    "web": Policy.WEB_ONLY,
    "filtered": Policy.FILTER_ONLY,
    "captioned": Policy.CAPTION_ONLY,
}


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm over all seeds: figures by name, one number a seed."""

    arm: Arm
    num_captions: int
    figures: dict[str, tuple[float, ...]]

    def row(self, first: "ArmResult") -> dict[str, Any]:
        """Return the row of the table: means, spreads, and how far from the first arm."""
        found: dict[str, Any] = {"arm": self.arm, "captions": self.num_captions}
        for name, values in self.figures.items():
            found[name] = _with_spread(values)
            if self is not first:
                pairs = zip(values, first.figures[name], strict=True)
                found[f"{name} - {first.arm}"] = _with_spread([a - b for a, b in pairs], sign="+")
            else:
                found[f"{name} - {first.arm}"] = ""
        return found


@dataclass(frozen=True, slots=True)
class Ablation:
    """The comparison of all arms."""

    stage: str
    num_steps: int | None
    seeds: tuple[int, ...]
    results: tuple[ArmResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return rows for the report and every single figure."""
        return {
            "description": (
                f"The same {self.stage} model trained on each arm with equal steps, batches and "
                f"seeds ({len(self.seeds)}), measured on images that no arm has seen. Mean and "
                "standard deviation over seeds; differences are paired by seed."
            ),
            "rows": [each.row(self.results[0]) for each in self.results],
            "figures": {
                each.arm: {n: list(v) for n, v in each.figures.items()} for each in self.results
            },
            "captions": {each.arm: each.num_captions for each in self.results},
            "seeds": list(self.seeds),
            "stage": self.stage,
        }

    def with_figure(self, name: str, values: Mapping[Arm, tuple[float, ...]]) -> "Ablation":
        """Return the comparison by one more figure, a number a seed for each arm."""
        results = tuple(
            replace(each, figures=each.figures | {name: values[each.arm]}) for each in self.results
        )
        return replace(self, results=results)

    def text(self, names: Sequence[str] = ()) -> str:
        """Return the table for people, of these figures or of all."""
        names = names or list(self.results[0].figures)
        lines = [f"{'arm':<11}{'captions':>9}" + "".join(f"{name:>17}" for name in names)]
        for each in self.results:
            figures = "".join(f"{_with_spread(each.figures[name]):>17}" for name in names)
            lines.append(f"{each.arm:<11}{each.num_captions:>9,}{figures}")
        return "\n".join(lines)


def ablate(recipe: Recipe, should_stop: Callable[[], bool]) -> Ablation | None:
    """Train and measure every arm; None when it was stopped first. The same call goes on.

    Raises UserError where something is missing.
    """
    tasks = arm_tasks(recipe)
    assert recipe.training is not None
    figures = side_by_side(tasks, recipe.training.num_at_once, should_stop)
    return None if figures is None else conclude(recipe, figures)


def arm_tasks(recipe: Recipe) -> dict[str, Task[Figures]]:
    """Give every arm its corpus; return what is then to be done for each, in any order.

    Raises UserError where something is missing.
    """
    if recipe.training is None or recipe.evaluation is None:
        raise UserError("an ablation asks for the sections `training` and `evaluation`; add them")
    stage, corpus = recipe.ablation.stage, open_corpus(recipe.root)
    _require_scores(recipe, corpus)
    open_tokenizer(training_job(recipe, stage), this_process())  # made once, for all arms
    arms = {arm: _arm_recipe(recipe, *arm) for arm in _trainings(recipe)}
    for (arm, _), own in arms.items():
        _fill(recipe, own, arm, corpus)
    return {
        f"{arm}-{seed}": partial(_train_and_measure, own, stage, recipe.root)
        for (arm, seed), own in arms.items()
    }


def conclude(recipe: Recipe, figures: Sequence[Figures]) -> Ablation:
    """Return the comparison that the results of all `arm_tasks` make, and write it down."""
    assert recipe.training is not None
    found = dict(zip(_trainings(recipe), figures, strict=True))
    config, results = recipe.ablation, []
    for arm in config.arms:
        own = [found[arm, seed] for seed in config.seeds]
        by_name = {name: tuple(each[name] for each in own) for name in own[0]}
        results.append(ArmResult(arm, _num_captions(recipe, arm), by_name))
    num_steps = recipe.training.of(config.stage).num_steps
    done = Ablation(config.stage, num_steps, config.seeds, tuple(results))
    write_ablation(open_corpus(recipe.root), done)
    return done


def _trainings(recipe: Recipe) -> list[tuple[Arm, int]]:
    config = recipe.ablation
    return [(arm, seed) for arm in config.arms for seed in config.seeds]


def _train_and_measure(
    own: Recipe, stage: Stage, scored_root: str, should_stop: Callable[[], bool]
) -> Figures | None:
    card = pretrain(training_job(own, stage), should_stop)
    if card is None:
        return None
    return evaluate(own, stage, pairs_of=open_corpus(scored_root)).figures


def _num_captions(recipe: Recipe, arm: Arm) -> int:
    """Return how many captions an arm was trained on."""
    corpus = open_corpus(arm_root(recipe, arm, recipe.ablation.seeds[0]))
    return sum(
        sum(record.stats["captions"]["kept"].values())
        for name in _sources(recipe)
        for record in corpus.shards("clean", name)
    )


def arm_root(recipe: Recipe, arm: Arm, seed: int) -> str:
    """Return where one training of an arm has its corpus and its model."""
    return f"{recipe.root}/ablation/{arm}-{seed}"


def arm_policy(recipe: Recipe, arm: Arm) -> SelectConfig:
    """Return the selection of an arm: the recipe's rules, and the policy that the arm is named for.

    `capfilt` is the recipe's own policy, BLIP's unless it says otherwise.
    """
    own = recipe.select or SelectConfig()
    if arm == "capfilt":
        return own
    return own.model_copy(update={"policy": _POLICIES[arm], "expression": None})


def _arm_recipe(recipe: Recipe, arm: Arm, seed: int) -> Recipe:
    """Return the recipe of one training; it differs by place, policy and seed alone."""
    stage = recipe.ablation.stage
    assert recipe.training is not None
    section = recipe.training.of(stage)
    if section.image_encoder == TRAINED:
        folder = f"{recipe.root}/train/med/export/captioner"
        section = section.model_copy(update={"image_encoder": folder})
    training = recipe.training.model_copy(
        update={stage: section.model_copy(update={"sources": None}), "med_data": "clean"}
    )
    names = _sources(recipe)
    return recipe.model_copy(
        update={
            "sources": tuple(each for each in recipe.sources if each.name in names),
            "root": arm_root(recipe, arm, seed),
            "seed": seed,
            "select": arm_policy(recipe, arm),
            "training": training,
        }
    )


def _fill(recipe: Recipe, own: Recipe, arm: Arm, corpus: Corpus) -> None:
    """Give one training of an arm its clean shards."""
    target, first = open_corpus(own.root), arm_root(recipe, arm, recipe.ablation.seeds[0])
    selector = Selector(target, own.select or SelectConfig(), replaces_other_policy=True)
    for source, index in _scored_shards(recipe, corpus):
        if own.root == first:
            raw, scored, _ = share_upstream(corpus, target, source, index)
            selector.select(raw, scored)
        else:
            share_shard(open_corpus(first), target, "clean", source, index)
    vocabulary = corpus.store.read(VOCABULARY)
    if vocabulary is not None and target.store.read(VOCABULARY) is None:
        target.store.make_folder("train")
        target.store.create(VOCABULARY, vocabulary)


def _scored_shards(recipe: Recipe, corpus: Corpus) -> Iterator[tuple[str, int]]:
    for name in _sources(recipe):
        for record in corpus.shards("captions", name):
            yield name, record.index


def _sources(recipe: Recipe) -> Sequence[str]:
    held_out = recipe.evaluation.source if recipe.evaluation else None
    if recipe.ablation.sources is not None:
        return [name for name in recipe.ablation.sources if name != held_out]
    return [
        each.name
        for each in recipe.sources
        if each.origin is not Origin.HUMAN and each.name != held_out
    ]


def _require_scores(recipe: Recipe, corpus: Corpus) -> None:
    if not any(True for _ in _scored_shards(recipe, corpus)):
        raise UserError(
            f"{corpus.root} has no scored shards of {', '.join(_sources(recipe)) or 'any source'}; "
            "score it first: capfilt score RECIPE"
        )


def _with_spread(values: Sequence[float], sign: str = "") -> str:
    mean = statistics.fmean(values)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean:{sign}.3f}{spread}"


def write_ablation(corpus: Corpus, done: Ablation) -> None:
    """Put the comparison where the report looks for it."""
    corpus.store.make_folder("report")
    corpus.store.remove(RESULT)
    corpus.store.create(RESULT, json.dumps(done.to_json(), indent=1).encode())
