"""`capfilt evaluate`: what a trained model finds and says of images that no stage trained on."""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jobs.corpus_root import open_corpus
from jobs.errors import UserError
from jobs.evaluation.captions import caption_quality
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.data import HeldOut, read_held_out
from jobs.evaluation.labelled import FilterQuality, filter_quality
from jobs.evaluation.models import Evaluable, Retriever, Writer, load_evaluable
from jobs.evaluation.retrieval import retrieval
from jobs.recipe import Recipe
from jobs.training.config import Stage
from jobs.training.exports import opened_export, read_card, stage_folder
from pipeline.corpus import Corpus
from pipeline.store import Store

RESULT = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one model, the captions that it wrote, and what they were taken from."""

    stage: Stage
    figures: dict[str, float]  # shares from 0 to 1, CIDEr from 0 to 10
    captions: tuple[str, ...]  # in the order of `keys`; empty where the model writes none
    keys: tuple[str, ...]
    about: dict[str, Any]
    quality: FilterQuality | None = None  # where there are labels, and the model can match

    def to_json(self) -> dict[str, Any]:
        """Return all but the captions, for people and machines."""
        quality = {} if self.quality is None else {"filter": self.quality.to_json()}
        return {"stage": self.stage, "figures": self.figures, **self.about, **quality}

    def text(self) -> str:
        """Return a small table."""
        about = self.about
        lines = [
            f"{self.stage} on {about['source']}: {about['images']:,} images, {about['texts']:,} "
            f"texts, {about['unreadable']:,} left out as unreadable"
        ]
        lines += [f"  {name:<8}{value:>8.3f}" for name, value in self.figures.items()]
        return "\n".join([*lines, *(self.quality.lines() if self.quality else ())])


def evaluate(recipe: Recipe, stage: Stage, *, pairs_of: Corpus | None = None) -> Evaluation:
    """Measure a stage's export, write the figures beside it, and return them.

    The held-out pairs are the recipe's own, or those of the corpus `pairs_of`. The figures are the
    same whatever the batch size and whoever runs it. Raises UserError when something is missing.
    """
    if recipe.evaluation is None or recipe.training is None:
        raise UserError(
            "the recipe has no section `evaluation`, or none `training`; add them, e.g. "
            "evaluation: {source: coco_test}"
        )
    config, corpus = recipe.evaluation, open_corpus(recipe.root)
    card = read_card(corpus.store, stage)
    if card is None:
        raise UserError(
            f"{corpus.root}/{stage_folder(stage)}/export is not there: train it first "
            f"(capfilt pretrain RECIPE --stage {stage})"
        )
    seen = pairs_of or corpus
    with opened_export(corpus.store, stage, card) as folder:
        model = load_evaluable(stage, folder, recipe.training.of(stage))
        pairs = read_held_out(seen, config.source, model.preprocessor, config.max_images)
        done = _measure(stage, model, pairs, config, card.fingerprint)
        if (quality := _quality(model, seen, config)) is not None:
            figures = done.figures | quality.figures()
            done = replace(done, figures=figures, quality=quality)
    _write(corpus.store, done)
    return done


def read_captions(store: Store, stage: Stage) -> dict[str, str]:
    """Return what an evaluated model said of each held-out image, by key; raises UserError."""
    path = f"{stage_folder(stage)}/{RESULT}"
    data = store.read(path)
    if data is None:
        raise UserError(f"{store.full(path)} is not there: capfilt evaluate writes it")
    captions: dict[str, str] = json.loads(data)["captions"]
    return captions


@torch.no_grad()
def _measure(
    stage: Stage, model: Evaluable, pairs: HeldOut, config: EvaluationConfig, fingerprint: str
) -> Evaluation:
    figures: dict[str, float] = {}
    about: dict[str, Any] = {
        "source": config.source,
        "images": len(pairs.keys),
        "texts": len(pairs.texts),
        "unreadable": pairs.num_unreadable,
        "candidates": config.num_candidates,
        "export": fingerprint,
    }
    captions: list[str] = []
    if model.retriever is not None:
        figures |= _retrieval(model.retriever, pairs, config)
    if model.writer is not None:
        captions = _captions(model.writer, pairs, config.batch_size)
        references = pairs.references()
        try:
            quality = caption_quality(captions, references, uses_java=config.uses_java)
        except ValueError as error:
            raise UserError(f"evaluation: {error}") from error
        figures |= quality.figures
        about["words_split_by"] = quality.tokenizer
    return Evaluation(stage, figures, tuple(captions), pairs.keys, about)


@torch.no_grad()
def _quality(model: Evaluable, corpus: Corpus, config: EvaluationConfig) -> FilterQuality | None:
    """Return how good a filter the model is, where it can match and there are labels."""
    if config.labels is None or model.retriever is None:
        return None
    return filter_quality(
        corpus,
        config.labels,
        config.source,
        model.retriever,
        model.preprocessor,
        config.batch_size,
    )


def _retrieval(model: Retriever, pairs: HeldOut, config: EvaluationConfig) -> dict[str, float]:
    size = config.batch_size
    images = torch.cat([model.image_features(part) for part in torch.split(pairs.pixels, size)])
    starts = range(0, len(pairs.texts), size)
    texts = torch.cat([model.text_features(pairs.texts[at : at + size]) for at in starts])
    # Image by image: all queries with all texts at once would not fit for long.
    similarity = torch.stack([(queries @ texts.t()).amax(dim=0) for queries in images])

    def rerank(image: int, chosen: Tensor) -> Tensor:
        seen = model.see(pairs.pixels[image : image + 1])
        parts = [
            model.match(seen, [pairs.texts[number] for number in part.tolist()])[:, 1]
            for part in torch.split(chosen, size)
        ]
        return torch.cat(parts)

    found = retrieval(similarity, pairs.image_of_text, rerank, config.num_candidates)
    return found.to_json()


def _captions(model: Writer, pairs: HeldOut, batch_size: int) -> list[str]:
    return [text for part in torch.split(pairs.pixels, batch_size) for text in model.captions(part)]


def _write(store: Store, done: Evaluation) -> None:
    path = f"{stage_folder(done.stage)}/{RESULT}"
    store.remove(path)
    text = json.dumps(
        done.to_json() | {"captions": dict(zip(done.keys, done.captions, strict=False))}
    )
    store.create(path, text.encode())
