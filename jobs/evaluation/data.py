"""Held-out pairs: the images of one source with all that people said about each.

They are read from raw shards, so that no policy has a say in what models are measured on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.errors import UserError
from pipeline.corpus import Corpus
from pipeline.loading.texts import clean_caption
from pipeline.models import ImagePreprocessor
from pipeline.sample import Sample, SampleError
from pipeline.score_config import ScoreConfig
from pipeline.score_images import decode_image
from pipeline.score_input import read_raw_shard

_MAX_WORDS = 50  # of a text, as in training


@dataclass(frozen=True, slots=True)
class HeldOut:
    """N images, their M texts, and which image each text is about."""

    keys: tuple[str, ...]
    pixels: Tensor  # (N, 3, S, S) float32
    texts: tuple[str, ...]  # cleaned as for training
    image_of_text: Tensor  # (M,) int64
    num_unreadable: int

    def references(self) -> list[list[str]]:
        """Return the texts of each image."""
        found: list[list[str]] = [[] for _ in self.keys]
        for text, image in zip(self.texts, self.image_of_text.tolist(), strict=True):
            found[image].append(text)
        return found


def read_held_out(
    corpus: Corpus, source: str, preprocessor: ImagePreprocessor, max_images: int | None = None
) -> HeldOut:
    """Return the pairs of a source; an image that cannot be read, or has no text, is counted.

    Raises UserError where there are fewer than two.
    """
    keys: list[str] = []
    texts: list[str] = []
    owners: list[int] = []
    pixels: list[Tensor] = []
    num_unreadable = 0
    for sample in _samples(corpus, source):
        if max_images is not None and len(keys) == max_images:
            break
        if isinstance(sample, SampleError):
            num_unreadable += 1
            continue
        said = [text for each in sample.captions if (text := clean_caption(each.text, _MAX_WORDS))]
        try:
            image = preprocessor(decode_image(sample.image, ScoreConfig()))
        except SampleError:
            said = []
        if not said:
            num_unreadable += 1
            continue
        owners += [len(keys)] * len(said)
        texts += said
        keys.append(sample.key)
        pixels.append(image)
    if len(keys) < 2:
        raise UserError(
            f"evaluation.source = {source!r}: {corpus.root} has {len(keys)} readable images of it; "
            "download the source first (capfilt download), or name another"
        )
    return HeldOut(
        tuple(keys), torch.stack(pixels), tuple(texts), torch.tensor(owners), num_unreadable
    )


def _samples(corpus: Corpus, source: str) -> Iterator[Sample | SampleError]:
    for record in corpus.shards("raw", source):
        for image in read_raw_shard(corpus, record):
            yield image.sample
