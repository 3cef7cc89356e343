"""Scores of captions: does this text match this image? ITM, ITC (BLIP, Sec. 3.3) and CLIP.

Every image goes through each encoder once, however many texts it has, and its keys and values are
projected once for all of them. A score is a function of the weights, the image and its texts: of
no batch, worker or order. On a CPU, in float32, that holds bit by bit, for each image goes alone.
Another list of texts for the same image can change a score by rounding, around 1e-7; scores are
rounded far above that. On an accelerator images go in groups of one size, and in bfloat16 a score
is near the float32 one, within some hundredths.

B images, S side of what a model sees, M packed tokens of an image's texts, n texts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer

from model.capfilt import MedFilter
from model.checkpoints import load_filter
from model.losses import at_least_float32
from model.med import ImageKeysValues
from model.packing import PackedTexts
from pipeline.clip_scorer import ClipScorer
from pipeline.image_decode import Pixels
from pipeline.model_configs import ScorerConfig
from pipeline.models import (
    ImagePreprocessor,
    bert_tokenizer,
    resolve_model,
    weights_fingerprint,
    with_commit,
)

# Stored scores have so many decimals: far finer than what they say, coarser than rounding inside
# a model.
DECIMALS = 5
Match = tuple[float | None, float | None]  # ITM and ITC of a text with its image
_MAX_PACKED = 512  # tokens of a row; the mask grows with its square
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image as each model sees it, (3, S, S) float32; None for a model that is not used."""

    filter: Tensor | None
    clip: Tensor | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What the models say of one caption; None where a model is not used. May be NaN."""

    itm: float | None = None  # P(match), in [0, 1]
    itc: float | None = None  # cosine, in [-1, 1]
    clip: float | None = None  # cosine, in [-1, 1]


class ItmFilter:
    """BLIP's filter on a device: ITM and ITC of texts with their images."""

    def __init__(
        self,
        model: MedFilter,
        tokenizer: BertTokenizer,
        preprocessor: ImagePreprocessor,
        config: ScorerConfig,
        *,
        fingerprint: str = "",
    ) -> None:
        """`model` is on its device and in its dtype; `fingerprint` is that of its weights."""
        self.preprocessor = preprocessor
        self.fingerprint = fingerprint
        self._config = config
        self._tokenizer = tokenizer
        weight = model.image_encoder.patches.weight
        self.device, self._dtype = weight.device, weight.dtype
        self._images_at_once = 1 if self.device.type == "cpu" else 32
        self._model = model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        config: ScorerConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Return the filter that `config.filter` names. Raises ModelError or CheckpointError."""
        assert config.filter is not None
        folder = resolve_model(config.filter)
        model = load_filter(folder).to(device, dtype)
        return cls(
            model,
            bert_tokenizer(folder, model.text.config),
            ImagePreprocessor.of_folder(folder, model.image_encoder.config.image_size),
            config,
            fingerprint=weights_fingerprint(folder),
        )

    @torch.inference_mode()
    def matches(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Match]]:
        """Return ITM and ITC of each text with its image; `pixels` is (B, 3, S, S).

        Every image has a text.
        """
        found: list[list[Match]] = []
        for start in range(0, len(texts), self._images_at_once):
            group = slice(start, start + self._images_at_once)
            try:
                found += self._group(pixels[group], texts[group])
            except torch.OutOfMemoryError:
                self._images_at_once = max(1, self._images_at_once // 2)
                raise
        return found

    def _group(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Match]]:
        distinct = [list(dict.fromkeys(each)) for each in texts]
        missing = self._images_at_once - len(pixels)
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing)).to(self.device, self._dtype)
        embeds = self._model.encode_image(padded)
        image = self._model.text.project_image(embeds, "encoder")
        rows: list[list[Match]] = [[] for _ in texts]
        for packs in self._packs(distinct):
            filled = [*packs, *[[]] * missing]
            packed = PackedTexts.of(filled, pad_id=self._tokenizer.pad_token_id)
            packed = packed.to(self.device)
            itm = self._itm(packed, image)
            itc = self._itc(packed, embeds) if self._config.has_itc else None
            for number, pack in enumerate(packs):
                cosines = itc[number].tolist() if itc is not None else [None] * len(pack)
                found = list(zip(itm[number].tolist(), cosines, strict=False))
                rows[number] += found[: len(pack)]
        scored = [
            dict(zip(each, row, strict=True)) for each, row in zip(distinct, rows, strict=True)
        ]
        return [[own[text] for text in each] for own, each in zip(scored, texts, strict=True)]

    def _itm(self, texts: PackedTexts, image: ImageKeysValues) -> Tensor:
        """Return P(match), (B, n) float32."""
        if not self._config.keeps_cls:
            texts = texts.starting_with(self._model.text.config.match_start_id)
        logits = self._model.itm_head(self._model.text.encode_packed(texts, image))
        return at_least_float32(logits).softmax(dim=2)[:, :, 1]

    def _itc(self, texts: PackedTexts, embeds: Tensor) -> Tensor:
        """Return cosines, (B, n) float32."""
        states = self._model.text.encode_packed(texts)
        features = F.normalize(at_least_float32(self._model.text_proj(states)), dim=-1)
        images = self._model.image_features(embeds)  # (B, E)
        return (features * images[:, None, :]).sum(dim=2)

    def _packs(self, texts: Sequence[Sequence[str]]) -> list[list[list[list[int]]]]:
        """Return rounds of token ids, [round][image][text]: no image has too many in one."""
        per_image = [self._split(self._tokens(each)) for each in texts]
        num_rounds = max(map(len, per_image))
        return [
            [packs[number] if number < len(packs) else [] for packs in per_image]
            for number in range(num_rounds)
        ]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        read = [cleaned(text) for text in texts] if self._config.is_text_cleaned else list(texts)
        encoded = self._tokenizer(read, truncation=True, max_length=self._config.max_tokens)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _split(self, texts: Sequence[list[int]]) -> list[list[list[int]]]:
        packs: list[list[list[int]]] = []
        room = 0
        for ids in texts:
            if room < len(ids):
                packs.append([])
                room = max(_MAX_PACKED, len(ids))
            packs[-1].append(ids)
            room -= len(ids)
        return packs


class Scorer:
    """All that scores captions, on one device."""

    def __init__(
        self, config: ScorerConfig, *, filter: ItmFilter | None, clip: ClipScorer | None
    ) -> None:
        """Raises ValueError when the models are not those that `config` asks for."""
        for name, asked, given in (("filter", config.filter, filter), ("clip", config.clip, clip)):
            if (asked is None) != (given is None):
                raise ValueError(f"the scorer's config and its models differ in {name}")
        self.config = config
        self._filter, self._clip = filter, clip

    @classmethod
    def load(
        cls,
        config: ScorerConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Return the scorer of a config. Raises ModelError or CheckpointError.

        Its own config says which commits names on the hub stood for.
        """
        asked = {"filter": config.filter, "clip": config.clip}
        found = {name: with_commit(each) for name, each in asked.items() if each is not None}
        config = config.model_copy(update=found)
        has_filter = config.filter is not None
        itm_filter = ItmFilter.load(config, device=device, dtype=dtype) if has_filter else None
        clip = None
        if config.clip is not None:
            clip = ClipScorer.load(config.clip, device=device, dtype=dtype)
        return cls(config, filter=itm_filter, clip=clip)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        found = [part.device for part in (self._filter, self._clip) if part is not None]
        return found[0]

    @property
    def fingerprints(self) -> dict[str, str]:
        """The weights behind "filter" and "clip", where there are such."""
        parts = {"filter": self._filter, "clip": self._clip}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    def preprocess(self, pixels: Pixels) -> PreparedImage:
        """Return what the models see of (H, W, 3) RGB; safe to call from many threads."""
        return PreparedImage(
            self._filter.preprocessor(pixels) if self._filter is not None else None,
            self._clip.preprocessor(pixels) if self._clip is not None else None,
        )

    def score(
        self, images: Sequence[PreparedImage], texts: Sequence[Sequence[str]]
    ) -> list[list[Scores]]:
        """Return the scores of each image's texts, of which there may be any number.

        Raises ValueError when images and texts differ in number. torch.OutOfMemoryError passes
        through, and fewer images are then looked at together.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images with texts for {len(texts)}")
        asked = [number for number, each in enumerate(texts) if each]
        scores: list[list[Scores]] = [[] for _ in texts]
        if asked:
            found = self._scores([images[n] for n in asked], [texts[n] for n in asked])
            for number, each in zip(asked, found, strict=True):
                scores[number] = each
        return scores

    def _scores(
        self, images: Sequence[PreparedImage], texts: Sequence[Sequence[str]]
    ) -> list[list[Scores]]:
        matches: list[list[Match]] = [[(None, None)] * len(each) for each in texts]
        cosines: list[list[float | None]] = [[None] * len(each) for each in texts]
        if self._filter is not None:
            pixels = torch.stack([_present(image.filter) for image in images])
            matches = self._filter.matches(pixels, texts)
        if self._clip is not None:
            pixels = torch.stack([_present(image.clip) for image in images])
            cosines = self._clip.similarities(pixels, texts)
        return [
            [Scores(*map(_rounded, (*match, clip))) for match, clip in zip(*each, strict=True)]
            for each in zip(matches, cosines, strict=True)
        ]


def cleaned(text: str) -> str:
    """Return a caption as BLIP cleans it: lower case, some punctuation gone, single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())


def _present(pixels: Tensor | None) -> Tensor:
    if pixels is None:
        raise ValueError("this image was prepared by a scorer of other models")
    return pixels


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, DECIMALS)
