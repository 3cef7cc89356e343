"""What happens to one image: decoded once, captioned, and scored with every caption it has.

B images, S the models' image sizes.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.image_decode import Pixels
from pipeline.sample import Origin, SampleError, ShardError
from pipeline.score_config import ScoreConfig
from pipeline.score_images import decode_image
from pipeline.score_input import RawImage, RawRow
from pipeline.score_memory import largest_that_runs, within_memory
from pipeline.score_outcome import ScoreTimes
from pipeline.score_rows import (
    SCORES,
    Candidate,
    Models,
    bad_score,
    caption_rows,
    lost_row,
    source_candidates,
    synthetic_candidate,
)

if TYPE_CHECKING:
    from pipeline.captioner import Captioner, GeneratedCaption
    from pipeline.scorer import PreparedImage, Scorer

_log = logging.getLogger(__name__)
_CPU_BATCH = 8
_PROBE_SIDE = 64  # pixels; the models resize it like any other
_PROBE_TEXT = "a word " * 64  # longer than any model reads
_Scores = dict[str, float | None]  # by name


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyImage:
    """An image as the models take it, or why they get to see nothing of it."""

    row: RawRow
    candidates: tuple[Candidate, ...] = ()
    caption_pixels: Tensor | None = None  # (3, S, S); None where it gets no synthetic captions
    score_image: "PreparedImage | None" = None
    lost: SampleError | None = None


class ModelStep:
    """The two models and the settings under which they see images; either may be absent."""

    def __init__(
        self,
        captioner: "Captioner | None",
        scorer: "Scorer | None",
        config: ScoreConfig,
        *,
        seed: int,
    ) -> None:
        """`seed` is the captioner's, to be stored with what it writes."""
        self._captioner = captioner
        self._scorer = scorer
        self._config = config
        self._seed = seed
        fingerprints = {} if scorer is None else scorer.fingerprints
        self._models = Models(
            captioner=None if captioner is None else captioner.fingerprint,
            filter=fingerprints.get("filter"),
            clip=fingerprints.get("clip"),
        )

    def content(self) -> dict[str, Any]:
        """Return all that decides what the captions and scores of an image are."""
        captioner, scorer = self._captioner, self._scorer
        return {
            "captioner": None if captioner is None else captioner.config.content(),
            "scorer": None if scorer is None else scorer.config.content(),
            "weights": {
                "captioner": self._models.captioner,
                "filter": self._models.filter,
                "clip": self._models.clip,
            },
            "score": self._config.content(),
            "seed": None if captioner is None else self._seed,
        }

    def prepare(self, image: RawImage) -> ReadyImage:
        """Return an image decoded once and made ready for each model; any thread may ask."""
        try:
            if isinstance(image.sample, SampleError):
                raise image.sample
            sample = image.sample
            candidates = source_candidates(
                sample.captions, sample.key, self._config.max_caption_chars
            )
            pixels = decode_image(sample.image, self._config)
        except SampleError as error:
            _log.debug("sample %s: %s", image.row.key, error)
            # A new one, for the traceback of this one holds the file.
            return ReadyImage(row=image.row, lost=SampleError(error.reason, error.message))
        is_human = image.row.origin is Origin.HUMAN or any(
            candidate.origin is Origin.HUMAN for candidate in candidates
        )
        ready = self._ready(image.row, pixels, is_captioned=not is_human)
        return replace(ready, candidates=candidates)

    def rows(
        self, images: Sequence[ReadyImage], *, shard: str, times: ScoreTimes
    ) -> list[list[dict[str, Any]]] | None:
        """Return the sidecar's rows of each image; None where memory does not suffice for so many.

        Raises ShardError for a score that is not a finite number.
        """
        return within_memory(partial(self._rows, images, shard, times))

    def _rows(
        self, images: Sequence[ReadyImage], shard: str, times: ScoreTimes
    ) -> list[list[dict[str, Any]]]:
        seen = [image for image in images if image.lost is None]
        started_at = time.perf_counter()
        seen = self._captioned(seen)
        captioned_at = time.perf_counter()
        scores = iter(list(self._scores(seen, shard)))  # all are checked before any is used
        times.caption += captioned_at - started_at
        times.score += time.perf_counter() - captioned_at
        complete = iter(seen)
        rows = []
        for image in images:
            if image.lost is not None:
                rows.append([lost_row(image.row, image.lost)])
                continue
            candidates = next(complete).candidates
            rows.append(caption_rows(image.row, candidates, iter(next(scores)), self._models))
        return rows

    def batch_size(self) -> int:
        """Return how many images to show the models at a time, found by trying on a GPU."""
        models = [model for model in (self._captioner, self._scorer) if model is not None]
        device = models[0].device if models else torch.device("cpu")
        most = self._config.max_batch_size
        if device.type == "cuda":
            return largest_that_runs(self._probe, most)
        # More gains nothing there: few images fill the cores.
        return min(_CPU_BATCH if self._captioner is None else self._captioner.images_at_once, most)

    def _probe(self, num_images: int) -> object:
        """Caption and score black images with long texts, to see what it takes."""
        pixels = np.zeros((_PROBE_SIDE, _PROBE_SIDE, 3), dtype=np.uint8)
        candidate = Candidate(text=_PROBE_TEXT, origin=Origin.WEB, index=0)
        images = []
        for number in range(num_images):
            row = RawRow(f"probe{number}", "probe", None, Origin.WEB)
            ready = self._ready(row, pixels, is_captioned=True)
            images.append(replace(ready, candidates=(candidate,)))
        return self._rows(images, "probe", ScoreTimes())

    def _ready(self, row: RawRow, pixels: Pixels, *, is_captioned: bool) -> ReadyImage:
        captioner, scorer = self._captioner, self._scorer
        return ReadyImage(
            row=row,
            caption_pixels=captioner.preprocess(pixels) if captioner and is_captioned else None,
            score_image=scorer.preprocess(pixels) if scorer else None,
        )

    def _captioned(self, images: Sequence[ReadyImage]) -> list[ReadyImage]:
        """Return the images with what the captioner wrote behind what they had."""
        asked = [image.caption_pixels for image in images if image.caption_pixels is not None]
        if self._captioner is None or not asked:
            return list(images)
        keys = [image.row.key for image in images if image.caption_pixels is not None]
        pixels = torch.stack(asked)  # (B, 3, S, S)
        written = iter(self._captioner.caption(pixels, keys))
        return [
            image if image.caption_pixels is None else self._with(image, next(written))
            for image in images
        ]

    def _with(self, image: ReadyImage, written: "Sequence[GeneratedCaption]") -> ReadyImage:
        synthetic = tuple(
            synthetic_candidate(
                each.text, index=each.index, num_tokens=each.num_tokens, seed=self._seed
            )
            for each in written
        )
        return replace(image, candidates=image.candidates + synthetic)

    def _scores(self, images: Sequence[ReadyImage], shard: str) -> Iterator[list[_Scores]]:
        """Yield the scores of each image's candidates that have a text to score."""
        texts = [[c.text for c in image.candidates if not c.reason] for image in images]
        if self._scorer is None:
            yield from ([dict.fromkeys(SCORES) for _ in of_image] for of_image in texts)
            return
        asked = {
            number: image.score_image
            for number, image in enumerate(images)
            if image.score_image is not None and texts[number]
        }
        scored = self._scorer.score(list(asked.values()), [texts[number] for number in asked])
        found = dict(zip(asked, scored, strict=True))
        for number, image in enumerate(images):
            of_image = [
                {name: getattr(each, name) for name in SCORES} for each in found.get(number, [])
            ]
            self._check(image, of_image, shard)
            yield of_image

    def _check(self, image: ReadyImage, scores: Sequence[_Scores], shard: str) -> None:
        scored = [candidate for candidate in image.candidates if not candidate.reason]
        for candidate, of_text in zip(scored, scores, strict=True):
            name = bad_score(of_text)
            if name is not None:
                raise ShardError(
                    f"shard {shard}, sample {image.row.key}, {candidate.origin} caption "
                    f"{candidate.index}: {name} is {of_text[name]}, from the {SCORES[name]} model "
                    f"with weights {getattr(self._models, SCORES[name])}; check these weights, and "
                    f'score with dtype "float32" if it was {self._config.dtype}'
                )
