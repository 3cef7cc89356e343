"""Trained models as what evaluation asks of them: to find, to match, to caption.

B images, R texts, E joint width, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from jobs.errors import UserError
from jobs.training.blip import FILTER_FOLDER
from jobs.training.blip2 import LAVIS_FILE
from jobs.training.build import stage1_of
from jobs.training.config import Stage, StageConfig
from jobs.training.plan import blip2_preset
from jobs.training.texts import PROMPT, TextTokenizer, load_tokenizer
from model.capfilt import MedCaptioner, MedFilter
from model.checkpoints import load_captioner, load_filter, load_stage1, load_stage2
from model.generation import DecodingConfig, greedy, med_decoder, qformer_decoder
from model.llm import LlmDecodingConfig
from model.llm_text import LlmTokenizer
from model.stage1 import Stage1
from model.stage2 import Stage2
from model.weight_files import load_strictly
from pipeline.models import ImagePreprocessor

_MAX_TOKENS = 35  # of a text, as BLIP and BLIP-2 evaluate


class Retriever(Protocol):
    """Compares images with texts."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return (B, Q, E) of (B, 3, S, S); Q is 1 where there are no queries."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return (R, E)."""

    def see(self, pixels: Tensor) -> Any:  # noqa: ANN401 -- each model has its own
        """Return what `match` reads of one image, (1, 3, S, S)."""

    def match(self, seen: Any, texts: Sequence[str]) -> Tensor:  # noqa: ANN401
        """Return the ITM logits of one image with each text, (R, 2); class 1 is a match."""


class Writer(Protocol):
    """Says what is to be seen."""

    def captions(self, pixels: Tensor) -> list[str]:
        """Return a caption for each of (B, 3, S, S), the likeliest token at every step."""


@dataclass(frozen=True, slots=True)
class Evaluable:
    """A trained model and what it can do."""

    preprocessor: ImagePreprocessor
    retriever: Retriever | None = None
    writer: Writer | None = None


@dataclass(frozen=True, slots=True)
class MedRetriever:
    """BLIP's filter, or MED itself."""

    model: MedFilter
    tokenizer: TextTokenizer

    def image_features(self, pixels: Tensor) -> Tensor:
        """See `Retriever`."""
        return self.model.image_features(self.model.encode_image(pixels))[:, None]

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """See `Retriever`."""
        return self.model.text_features(*self.tokenizer.encode(texts, _MAX_TOKENS))

    def see(self, pixels: Tensor) -> Any:  # noqa: ANN401
        """See `Retriever`."""
        return self.model.text.project_image(self.model.encode_image(pixels), "encoder")

    def match(self, seen: Any, texts: Sequence[str]) -> Tensor:  # noqa: ANN401
        """See `Retriever`."""
        return self.model.match_logits(seen, *self.tokenizer.encode(texts, _MAX_TOKENS))


@dataclass(frozen=True, slots=True)
class MedWriter:
    """BLIP's captioner, behind the prompt that it was fine-tuned with."""

    model: MedCaptioner
    tokenizer: TextTokenizer

    def captions(self, pixels: Tensor) -> list[str]:
        """See `Writer`."""
        prompt = torch.tensor([self.tokenizer.prompt_ids(PROMPT)]).expand(len(pixels), -1)
        config = _decoding(self.tokenizer)
        state = self.model.begin(pixels, max_length=config.total_lengths(prompt.shape[1])[1])
        ids = greedy(med_decoder(self.model), state, prompt, config)
        return self.tokenizer.decode(ids, prompt.shape[1])


@dataclass(frozen=True, slots=True)
class Stage1Model:
    """BLIP-2's stage 1: it retrieves, matches and captions."""

    model: Stage1
    tokenizer: TextTokenizer

    def image_features(self, pixels: Tensor) -> Tensor:
        """See `Retriever`."""
        return self.model.image_features(pixels).feats

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """See `Retriever`."""
        return self.model.text_features(*self.tokenizer.encode(texts, _MAX_TOKENS))[:, 0]

    def see(self, pixels: Tensor) -> Any:  # noqa: ANN401
        """See `Retriever`."""
        return self.model.qformer.project_image(self.model.encode_image(pixels))

    def match(self, seen: Any, texts: Sequence[str]) -> Tensor:  # noqa: ANN401
        """See `Retriever`."""
        ids, is_real = self.tokenizer.encode(texts, _MAX_TOKENS)
        return self.model.match_logits(seen.shared_by(len(texts)), ids, is_real)

    def captions(self, pixels: Tensor) -> list[str]:
        """See `Writer`."""
        start = torch.full((len(pixels), 1), self.model.config.caption_start_id)
        cache = self.model.begin_caption(pixels)
        decoder = qformer_decoder(self.model.qformer)
        ids = greedy(decoder, cache, start, _decoding(self.tokenizer))
        return self.tokenizer.decode(ids, 1)


@dataclass(frozen=True, slots=True)
class Stage2Writer:
    """BLIP-2's stage 2, without a prompt."""

    model: Stage2
    tokenizer: LlmTokenizer
    num_beams: int = 1

    def captions(self, pixels: Tensor) -> list[str]:
        """See `Writer`."""
        config = LlmDecodingConfig(num_beams=self.num_beams)
        prompts = [""] * len(pixels)
        return [c.strip() for c in self.model.generate(pixels, prompts, self.tokenizer, config)]


def load_evaluable(stage: Stage, folder: Path, section: StageConfig) -> Evaluable:
    """Return the model that a stage handed over in `folder`, in float32 on the CPU.

    Raises UserError and CheckpointError.
    """
    if stage == "stage2":
        return _stage2(folder)
    if stage == "med":
        folder = folder / FILTER_FOLDER
    tokenizer = load_tokenizer(str(folder))
    if stage == "stage1":
        model = _stage1(folder, section, tokenizer)
        both = Stage1Model(model, tokenizer)
        return Evaluable(_preprocessor(folder, model.image_encoder), both, both)
    if stage == "captioner":
        captioner = load_captioner(folder)
        writer = MedWriter(captioner, tokenizer)
        return Evaluable(_preprocessor(folder, captioner.image_encoder), writer=writer)
    matcher = load_filter(folder)
    retriever = MedRetriever(matcher, tokenizer)
    return Evaluable(_preprocessor(folder, matcher.image_encoder), retriever)


def _stage1(folder: Path, section: StageConfig, tokenizer: TextTokenizer) -> Stage1:
    if not (folder / LAVIS_FILE).is_file():
        return load_stage1(folder)
    preset = blip2_preset("stage1", section).with_vocabulary(tokenizer.num_plain)
    model = preset.build_stage1()
    load_strictly(model, stage1_of(folder, preset), source=str(folder))
    return model.eval()


def _stage2(folder: Path) -> Evaluable:
    if (folder / LAVIS_FILE).is_file():
        raise UserError(
            f"{folder} is in LAVIS names, for transformers has no such image encoder; its language "
            "model is not in it, so it cannot be evaluated by itself"
        )
    from transformers import AutoTokenizer

    model = load_stage2(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    writer = Stage2Writer(model, LlmTokenizer.for_llm(tokenizer, model.llm.model.config))
    return Evaluable(_preprocessor(folder, model.image_encoder), writer=writer)


def _preprocessor(folder: Path, encoder: Any) -> ImagePreprocessor:  # noqa: ANN401
    return ImagePreprocessor.of_folder(folder, encoder.config.image_size)


def _decoding(tokenizer: TextTokenizer) -> DecodingConfig:
    return DecodingConfig(
        end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
        min_length=1,
        max_length=30,
        counts_prompt=False,
    )
