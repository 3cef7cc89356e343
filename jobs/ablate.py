"""`capfilt ablate`: does cleaning help on your data? (BLIP, Table 1)

From one scored corpus, several are selected; the same small model is trained on each, with the same
steps and seeds, and measured on the same images that none has seen. Every arm is a corpus of its
own below `<root>/ablation`, with the images of the first by hard link.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.evaluate import evaluate
from jobs.evaluation.config import Arm
from jobs.pretrain import pretrain
from jobs.recipe import Recipe
from jobs.training.config import TRAINED
from jobs.training.context import this_process
from jobs.training.data import VOCABULARY, open_tokenizer
from jobs.training.job import training_job
from pipeline.corpus import Corpus
from pipeline.select import Selector
from pipeline.selection.config import Policy, SelectConfig
from pipeline.share import share_shard, share_upstream
from pipeline.sources.rows import Origin

RESULT = "report/ablation.json"
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
    if recipe.training is None or recipe.evaluation is None:
        raise UserError("an ablation asks for the sections `training` and `evaluation`; add them")
    config, corpus = recipe.ablation, open_corpus(recipe.root)
    _require_scores(recipe, corpus)
    open_tokenizer(training_job(recipe, config.stage), this_process())  # made once, for all arms
    results = []
    for arm in config.arms:
        figures: list[dict[str, float]] = []
        num_captions = 0
        for seed in config.seeds:
            own = _arm_recipe(recipe, arm, seed)
            num_captions = _fill(recipe, own, arm, corpus)
            card = pretrain(training_job(own, config.stage), should_stop)
            if card is None:
                return None
            figures.append(evaluate(own, config.stage, pairs_of=corpus).figures)
        by_name = {name: tuple(each[name] for each in figures) for name in figures[0]}
        results.append(ArmResult(arm, num_captions, by_name))
    steps = recipe.training.of(config.stage).num_steps
    done = Ablation(config.stage, steps, config.seeds, tuple(results))
    write_ablation(corpus, done)
    return done


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


def _fill(recipe: Recipe, own: Recipe, arm: Arm, corpus: Corpus) -> int:
    """Give an arm its clean shards; return how many captions they have."""
    target, first = open_corpus(own.root), arm_root(recipe, arm, recipe.ablation.seeds[0])
    is_first = own.root == first
    selector = Selector(target, own.select or SelectConfig(), replaces_other_policy=True)
    num_captions = 0
    for source, index in _scored_shards(recipe, corpus):
        if is_first:
            raw, scored, _ = share_upstream(corpus, target, source, index)
            record = selector.select(raw, scored).record
        else:
            record, _ = share_shard(open_corpus(first), target, "clean", source, index)
        num_captions += sum(record.stats["captions"]["kept"].values())
    vocabulary = corpus.store.read(VOCABULARY)
    if vocabulary is not None and target.store.read(VOCABULARY) is None:
        target.store.make_folder("train")
        target.store.create(VOCABULARY, vocabulary)
    return num_captions


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
