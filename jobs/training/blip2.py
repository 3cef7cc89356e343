"""BLIP-2's two stages: the Q-Former learns to represent images, then to prompt a frozen LLM.

Dims: B pairs, T text tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from jobs.training.exports import write_processor
from jobs.training.gates import Expectations
from jobs.training.objectives import Batch, LmLook, Look, Moment
from jobs.training.texts import TextTokenizer, save_tokenizer
from model import lavis_files
from model.checkpoints import image_token, save_stage1, save_stage2
from model.generation import DecodingConfig, greedy, qformer_decoder
from model.llm import LlmDecodingConfig
from model.llm_text import (
    CausalText,
    LlmTokenizer,
    PrefixText,
    causal_text,
    prefix_text,
    split_caption,
)
from model.losses import IGNORED, next_token_targets, token_losses
from model.stage1 import Stage1, Stage1Losses
from model.stage2 import Stage2, Stage2Loss
from model.vision import ImageEncoder
from model.weight_files import Reasons

LAVIS_FILE = "lavis.safetensors"  # in place of transformers' files where those have no such tower
_FROZEN_TOWER = {r"image_encoder\..*": "frozen: known by its fingerprint"}
_Ids = tuple[Tensor, Tensor]
_PROBE_DECODING = LlmDecodingConfig(num_beams=1, max_new_tokens=20)


class Stage1Objective:
    """Image-text contrast, matching and grounded generation with a frozen tower (BLIP-2, 3.2)."""

    frozen: Reasons = _FROZEN_TOWER

    def __init__(
        self,
        model: Stage1,
        tokenizer: TextTokenizer,
        *,
        max_tokens: int,
        contrast_size: int,
        alarm_after: int,
    ) -> None:
        """`contrast_size` is how many pairs ITC compares: a micro-batch of every rank."""
        self.model: nn.Module = model
        self._stage1 = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self.expected = Expectations(
            num_contrasted=contrast_size,
            temperature_range=model.config.temperature_range or (0.001, 0.5),
            after_steps=alarm_after,
        )

    def read_texts(self, texts: Sequence[str], keys: Sequence[str], step: int) -> _Ids:
        """Return ids behind [CLS] and which are real, (B, T) each."""
        return self._tokenizer.encode(texts, self._max_tokens)

    def losses(self, forward: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Return ITC, ITM and ITG."""
        ids, is_real = cast(_Ids, batch.text)
        out: Stage1Losses = forward(batch.pixels, ids, is_real, batch.image_ids)
        return {"loss": out.total, "itc": out.itc, "itm": out.itm, "itg": out.itg}

    def numbers(self) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": float(self._stage1.temperature.detach())}

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """Return features, matches and what captioning comes to."""
        ids, is_real = cast(_Ids, batch.text)
        model = self._stage1
        images = model.qformer.project_image(model.encode_image(batch.pixels))
        margins = [
            logits[:, 1] - logits[:, 0]
            for logits in (
                model.match_logits(images, ids, is_real),
                model.match_logits(images, ids.roll(1, 0), is_real.roll(1, 0)),
            )
        ]
        pixels = batch.pixels
        shown = (pixels, None, torch.zeros_like(pixels))
        seen, blind, blank = (self._lm(each, ids, is_real) for each in shown)
        return Look(
            image_feats=model.image_features(batch.pixels).feats,
            text_feats=model.text_features(ids, is_real)[:, 0],
            matches=(margins[0], margins[1]),
            lm=LmLook(seen, blind, blank),
            captions=self._captions(batch.pixels),
        )

    def export(self, folder: Path) -> None:
        """Write what Blip2ForImageTextRetrieval loads, or LAVIS where that has no such tower."""
        _export_stage1(self._stage1, folder)
        write_processor(folder, _image_size(self._stage1))
        save_tokenizer(self._tokenizer, folder)

    def _lm(self, pixels: Tensor | None, ids: Tensor, is_real: Tensor) -> float:
        """Return ITG without smoothing; without images, the queries masked from the text."""
        model = self._stage1
        queries = None
        if pixels is not None:
            seen = model.qformer.project_image(model.encode_image(pixels))
            queries = model.qformer.encode_image(seen).layers
        start = torch.full_like(ids[:, :1], model.config.caption_start_id)
        states = model.qformer.decode(torch.cat((start, ids[:, 1:]), 1), is_real, queries)
        logits = model.qformer.next_token_logits(states[:, :-1])
        return _mean_loss(logits, next_token_targets(ids, is_real))

    def _captions(self, pixels: Tensor) -> list[str]:
        tokenizer, model = self._tokenizer, self._stage1
        start = torch.full((len(pixels), 1), model.config.caption_start_id, device=pixels.device)
        config = DecodingConfig(end_id=tokenizer.end_id, pad_id=tokenizer.pad_id, min_length=1)
        cache = model.begin_caption(pixels)
        return tokenizer.decode(greedy(qformer_decoder(model.qformer), cache, start, config), 1)


class Stage2Objective:
    """Language modelling by a frozen LLM behind the queries' soft prompt (BLIP-2, Sec. 3.3)."""

    frozen: Reasons = _FROZEN_TOWER | {r"llm\..*": "frozen: known by its fingerprint"}

    def __init__(
        self,
        model: Stage2,
        tokenizer: LlmTokenizer,
        *,
        max_tokens: int,
        seed: int,
        alarm_after: int,
    ) -> None:
        """`seed` decides where captions are split for an encoder-decoder.

        Raises ValueError for a language model that could not be exported once it is trained.
        """
        self.model: nn.Module = model
        self._stage2 = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._seed = seed
        self._image_token = _image_token(model, len(tokenizer.tokenizer))
        self.expected = Expectations(after_steps=alarm_after)

    def read_texts(
        self, texts: Sequence[str], keys: Sequence[str], step: int
    ) -> CausalText | PrefixText:
        """Return the captions for a decoder, or split in two for an encoder-decoder."""
        if not self._stage2.llm.is_encoder_decoder:
            return causal_text(self._tokenizer, texts, max_length=self._max_tokens)
        halves = [
            split_caption(text, seed=self._seed, key=key, epoch=step)
            for text, key in zip(texts, keys, strict=True)
        ]
        prefixes, suffixes = zip(*halves, strict=True)
        return prefix_text(self._tokenizer, prefixes, suffixes, max_length=self._max_tokens)

    def losses(self, forward: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Return the language modelling loss."""
        out: Stage2Loss = forward(batch.pixels, batch.text)
        return {"loss": out.loss, "lm": out.loss}

    def numbers(self) -> dict[str, float]:
        """Return nothing beside the loss."""
        return {}

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """Return what captioning comes to."""
        model, text = self._stage2, cast(CausalText | PrefixText, batch.text)
        targets = _targets_behind_text(text)
        prompts = [model.soft_prompt(p) for p in (batch.pixels, torch.zeros_like(batch.pixels))]
        seen, blank = (_mean_loss(model.logits(prompt, text), targets) for prompt in prompts)
        blind = _mean_loss(model.logits(prompts[0], text, sees_prompt=False), targets)
        nothing = [""] * len(batch.pixels)
        captions = model.generate(batch.pixels, nothing, self._tokenizer, _PROBE_DECODING)
        return Look(lm=LmLook(seen, blind, blank), captions=captions)

    def export(self, folder: Path) -> None:
        """Write what Blip2ForConditionalGeneration loads, the language model included."""
        model = self._stage2
        if _fits_transformers(model):
            save_stage2(model, folder, image_token_id=self._image_token)
        else:
            lavis_files.save_stage2(model, folder / LAVIS_FILE)
        write_processor(folder, _image_size(model))
        self._tokenizer.tokenizer.save_pretrained(str(folder))


def _image_token(model: Stage2, num_tokens: int) -> int | None:
    """Return the id that marks an image in transformers' folder, or None for LAVIS's."""
    if not _fits_transformers(model):
        return None
    return image_token(model.llm.model.config, num_tokens)


def _export_stage1(model: Stage1, folder: Path) -> None:
    if _fits_transformers(model):
        save_stage1(model, folder)
    else:
        lavis_files.save_stage1(model, folder / LAVIS_FILE, with_frozen=True)


def _fits_transformers(model: Stage1 | Stage2) -> bool:
    """Say whether transformers' Blip2 classes have this image encoder: EVA-CLIP's kind only."""
    config = cast(ImageEncoder, model.image_encoder).config
    return not (config.has_norm_before or config.has_norm_after) and config.activation == "gelu"


def _image_size(model: Stage1 | Stage2) -> int:
    return cast(ImageEncoder, model.image_encoder).config.image_size


def _targets_behind_text(text: CausalText | PrefixText) -> Tensor:
    """Return the targets that text precedes, which can be predicted without a prompt too."""
    if isinstance(text, PrefixText):
        return text.targets
    first = torch.arange(text.targets.shape[1], device=text.targets.device) == 0
    return text.targets.masked_fill(first, IGNORED)


def _mean_loss(logits: Tensor, targets: Tensor) -> float:
    losses = token_losses(logits, targets)
    return float(losses.sum() / (targets >= 0).sum().clamp_min(1))
