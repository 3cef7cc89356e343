"""A model as a filter, on pairs that people have labelled: does it know right captions from wrong?

What `capfilt calibrate` does for the scores that are stored, this does for a trained model: it
looks at the images and reads the captions itself, by ITM and by ITC. CLIP's score, which no stage
trains, is the one that the corpus holds of a caption.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.errors import UserError
from jobs.evaluation.matching import Matching, even_thresholds, matching
from jobs.evaluation.models import Retriever
from pipeline.corpus import Corpus
from pipeline.loading.texts import clean_caption
from pipeline.models import ImagePreprocessor
from pipeline.report.labels import LabelledPair, StoredCaption, read_labels, stored_captions
from pipeline.report.ledgers import Ledgers, Snapshot
from pipeline.sample import Sample, SampleError
from pipeline.score_config import ScoreConfig
from pipeline.score_images import decode_image
from pipeline.score_input import read_raw_shard
from pipeline.why_find import find

_MAX_WORDS = 50  # of a text, as in training
_ITM, _ITC, _CLIP = "ITM", "ITC", "CLIP"


@dataclass(frozen=True, slots=True)
class FilterQuality:
    """How well each score tells labelled pairs apart, by the score's name."""

    scores: Mapping[str, Matching]
    num_pairs: int
    num_missing: int  # labels whose image or caption the corpus does not have, or cannot read

    def figures(self) -> dict[str, float]:
        """Return the model's own ROC-AUCs by name."""
        found = {f"{name} AUC": self.scores[name].auc for name in (_ITM, _ITC)}
        return {name: auc for name, auc in found.items() if auc is not None}

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        scores = {name: asdict(each) for name, each in self.scores.items()}
        return {"pairs": self.num_pairs, "missing": self.num_missing, "scores": scores}

    def lines(self) -> Iterator[str]:
        """Yield a table for people."""
        yield f"{self.num_pairs:,} labelled pairs, {self.num_missing:,} not found or not readable"
        for name, found in self.scores.items():
            auc = "-" if found.auc is None else f"{found.auc:.3f}"
            yield f"  {name}: AUC {auc}, {found.num_right:,} right, {found.num_wrong:,} wrong"
            yield f"  {'from':>8}{'kept':>8}{'precision':>11}{'recall':>8}"
            for at in found.thresholds:
                shares = (at.precision, at.recall)
                shown = ["-" if share is None else f"{share:.3f}" for share in shares]
                yield f"  {at.threshold:>8.2f}{at.num_kept:>8,}{shown[0]:>11}{shown[1]:>8}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """One image and the labelled captions of it."""

    pixels: Tensor  # (3, S, S) float32
    labels: tuple[int, ...]
    texts: tuple[str, ...]


def filter_quality(
    corpus: Corpus,
    path: str,
    source: str,
    model: Retriever,
    preprocessor: ImagePreprocessor,
    batch_size: int,
) -> FilterQuality:
    """Judge a model by the labels at `path`, whose images are of `source` unless they say else.

    `batch_size` texts of an image are looked at together, which decides no figure. Raises UserError
    for a table that cannot be read, and one of which nothing is in the corpus.
    """
    try:
        labels = read_labels(path, source)
    except ValueError as error:
        raise UserError(f"evaluation.labels: {error}") from error
    with Ledgers.open(corpus, Snapshot.take(corpus)) as ledgers:
        stored = stored_captions(ledgers, labels)
    found: dict[str, dict[int, float]] = {_ITM: {}, _ITC: {}, _CLIP: {}}
    for seen in _images(corpus, labels, stored, preprocessor):
        itm, itc = _scores(model, seen, batch_size)
        found[_ITM] |= zip(seen.labels, itm.tolist(), strict=True)
        found[_ITC] |= zip(seen.labels, itc.tolist(), strict=True)
        clips = {n: stored[n].clip for n in seen.labels if n in stored}
        found[_CLIP] |= {number: clip for number, clip in clips.items() if clip is not None}
    if not found[_ITM]:
        raise UserError(
            f"evaluation.labels = {path!r}: {corpus.root} has none of its {len(labels):,} pairs; "
            "check the columns source and key, and caption or origin and index"
        )
    return FilterQuality(
        {name: _judged(name, values, labels) for name, values in found.items() if values},
        num_pairs=len(found[_ITM]),
        num_missing=len(labels) - len(found[_ITM]),
    )


def _judged(name: str, values: Mapping[int, float], labels: Sequence[LabelledPair]) -> Matching:
    scores = np.array(list(values.values()))
    is_right = np.array([labels[number].is_match for number in values])
    return matching(scores, is_right, None if name == _ITM else even_thresholds(scores))


def _scores(model: Retriever, seen: _Seen, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return P(match) and the cosine of an image and each of its texts, (R,) each."""
    pixels = seen.pixels[None]
    image, projected = model.image_features(pixels)[0], model.see(pixels)
    itm, itc = [], []
    for start in range(0, len(seen.texts), batch_size):
        texts = seen.texts[start : start + batch_size]
        itm.append(model.match(projected, texts).softmax(dim=1)[:, 1])
        itc.append((model.text_features(texts) @ image.t()).amax(dim=1))
    return torch.cat(itm), torch.cat(itc)


def _images(
    corpus: Corpus,
    labels: Sequence[LabelledPair],
    stored: Mapping[int, StoredCaption],
    preprocessor: ImagePreprocessor,
) -> Iterator[_Seen]:
    """Yield each labelled image that the corpus has, shard by shard, with the texts to judge."""
    wanted: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, pair in enumerate(labels):
        wanted[pair.source, pair.key].append(number)
    shards = {}
    for source, key in wanted:
        if (raw := find(corpus, key, source).get("raw")) is not None:
            shards[raw.record.name] = raw.record
    for _, record in sorted(shards.items()):
        for image in read_raw_shard(corpus, record):
            numbers = wanted.get((record.source, image.row.key), [])
            if isinstance(image.sample, SampleError) or not numbers:
                continue
            texts = {n: _text(labels[n], stored.get(n), image.sample) for n in numbers}
            readable = {number: text for number, text in texts.items() if text}
            try:
                pixels = preprocessor(decode_image(image.sample.image, ScoreConfig()))
            except SampleError:
                continue
            if readable:
                yield _Seen(pixels, tuple(readable), tuple(readable.values()))


def _text(pair: LabelledPair, stored: StoredCaption | None, sample: Sample) -> str | None:
    """Return the caption of a label as the model reads it; None where there is none."""
    text = pair.text or (stored.text if stored is not None else None)
    if text is None:
        own = (c.text for c in sample.captions if (c.origin, c.index) == (pair.origin, pair.index))
        text = next(own, None)
    return None if text is None else clean_caption(text, _MAX_WORDS)
