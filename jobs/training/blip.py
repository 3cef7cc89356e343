"""BLIP's three stages: MED learns all it can, then the captioner and the filter one thing each.

Dims: B pairs, T text tokens, E joint width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from jobs.training.exports import write_processor
from jobs.training.gates import Expectations
from jobs.training.objectives import Batch, LmLook, Look, Moment
from jobs.training.texts import PROMPT, TextTokenizer, save_tokenizer
from model.capfilt import MedCaptioner, MedFilter, caption_loss, load_part
from model.checkpoints import save_captioner, save_filter
from model.generation import Decoder, DecodingConfig, greedy
from model.med import DecoderState, MedText, starting_with
from model.med_pretraining import MedLosses, MedPretraining, MedStep
from model.vision import ImageEncoder
from model.weight_files import Reasons

CAPTIONER_FOLDER, FILTER_FOLDER = "captioner", "filter"  # of MED's export
_Ids = tuple[Tensor, Tensor]  # (B, T) int64 ids, (B, T) bool which are real


class MedObjective:
    """Pretraining of MED, and fine-tuning of the filter: the same losses but for LM."""

    frozen: Reasons = {}

    def __init__(
        self,
        model: MedPretraining,
        tokenizer: TextTokenizer,
        *,
        max_tokens: int,
        batch_size: int,
        alarm_after: int,
    ) -> None:
        """`batch_size` is that of a micro-batch; ITC compares with it and the queue."""
        self.model: nn.Module = model
        self._med = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self.expected = Expectations(
            num_contrasted=model.queue.size + batch_size,
            temperature_range=model.objectives.temperature_range,
            after_steps=alarm_after,
        )

    def read_texts(self, texts: Sequence[str], keys: Sequence[str], step: int) -> _Ids:
        """Return ids behind [CLS] and which are real, (B, T) each."""
        return self._tokenizer.encode(texts, self._max_tokens)

    def losses(self, forward: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Return ITC, ITM and, in pretraining, LM (BLIP, Sec. 3.2)."""
        ids, is_real = cast(_Ids, batch.text)
        # A tensor, not a number: a compiled model would be compiled again for every new alpha.
        alpha = torch.full((), moment.alpha, device=ids.device)
        step = MedStep(
            alpha=alpha,
            micro_batch=moment.micro_batch,
            num_micro_batches=moment.num_micro_batches,
        )
        out: MedLosses = forward(batch.pixels, ids, is_real, batch.image_ids, step)
        terms = {"loss": out.total, "itc": out.itc, "itm": out.itm}
        return terms | ({"lm": out.lm} if self._med.objectives.has_lm else {})

    def numbers(self) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": float(self._med.temperature.detach())}

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """Return features, matches and, where MED has a decoder, what captioning comes to."""
        ids, is_real = cast(_Ids, batch.text)
        med = self._med
        embeds = med.encode_image(batch.pixels)
        image = med.text.project_image(embeds, "encoder")
        logits = [
            med.match_logits(image, shown, real)
            for shown, real in ((ids, is_real), (ids.roll(1, 0), is_real.roll(1, 0)))
        ]
        lm = captions = None
        if med.objectives.has_lm:
            lm = _lm_look(med.image_encoder, med.text, batch)
            captions = _captions(embeds, med.text, self._tokenizer, "")
        return Look(
            image_feats=med.image_features(embeds),
            text_feats=med.text_features(ids, is_real),
            matches=(_margin(logits[0]), _margin(logits[1])),
            lm=lm,
            captions=captions,
        )

    def export(self, folder: Path) -> None:
        """Write the filter; after pretraining, two folders, captioner and filter."""
        med = self._med
        if not med.objectives.has_lm:
            _export_filter(med, self._tokenizer, folder)
            return
        _export_filter(med, self._tokenizer, folder / FILTER_FOLDER)
        part = folder / CAPTIONER_FOLDER
        _export_captioner(med.image_encoder, med.text, med.state_dict(), self._tokenizer, part)


class CaptionerObjective:
    """Fine-tuning of the captioner: language modelling behind a prompt (BLIP, Sec. 3.3)."""

    frozen: Reasons = {}

    def __init__(
        self, model: MedCaptioner, tokenizer: TextTokenizer, *, max_tokens: int, alarm_after: int
    ) -> None:
        self.model: nn.Module = model
        self._captioner = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._prompt_length = len(tokenizer.prompt_ids(PROMPT))
        self.expected = Expectations(after_steps=alarm_after)

    def read_texts(self, texts: Sequence[str], keys: Sequence[str], step: int) -> _Ids:
        """Return ids of prompt and caption behind [CLS], and which are real, (B, T) each."""
        return self._tokenizer.encode([f"{PROMPT} {text}" for text in texts], self._max_tokens)

    def losses(self, forward: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Return the language modelling loss of what follows the prompt."""
        ids, is_real = cast(_Ids, batch.text)
        loss: Tensor = forward(batch.pixels, ids, is_real, prompt_length=self._prompt_length)
        return {"loss": loss, "lm": loss}

    def numbers(self) -> dict[str, float]:
        """Return nothing beside the loss."""
        return {}

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """Return what captioning comes to."""
        model = self._captioner
        lm = _lm_look(model.image_encoder, model.text, batch, self._prompt_length)
        embeds = model.image_encoder(batch.pixels)
        captions = _captions(embeds, model.text, self._tokenizer, PROMPT)
        return Look(lm=lm, captions=captions)

    def export(self, folder: Path) -> None:
        """Write what BlipForConditionalGeneration loads."""
        model = self._captioner
        state = model.state_dict()
        _export_captioner(model.image_encoder, model.text, state, self._tokenizer, folder)


def _export_captioner(
    encoder: ImageEncoder,
    text: MedText,
    state: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    folder: Path,
) -> None:
    plain = MedCaptioner(encoder.config, text.config)
    load_part(plain, {name: tensor.cpu() for name, tensor in state.items()})
    save_captioner(plain, folder)
    write_processor(folder, encoder.config.image_size)
    save_tokenizer(tokenizer, folder)


def _export_filter(model: MedFilter, tokenizer: TextTokenizer, folder: Path) -> None:
    plain = MedFilter(
        model.image_encoder.config, model.text.config, joint_width=model.vision_proj.out_features
    )
    load_part(plain, {name: tensor.cpu() for name, tensor in model.state_dict().items()})
    save_filter(plain, folder)
    write_processor(folder, model.image_encoder.config.image_size)
    save_tokenizer(tokenizer, folder)


def _lm_look(encoder: ImageEncoder, text: MedText, batch: Batch, prompt_length: int = 1) -> LmLook:
    """Return the LM loss with the images, with cross-attention finding none, and with blank ones.

    Masked is exact: of no image token, attention makes zero, whatever the image.
    """
    ids, is_real = cast(_Ids, batch.text)
    start = starting_with(text.config.caption_start_id, ids)
    seen, blank = (
        text.project_image(encoder(pixels), "decoder")
        for pixels in (batch.pixels, torch.zeros_like(batch.pixels))
    )
    shown = (seen, text.no_image(len(ids)), blank)
    losses = (
        caption_loss(text, image, start, is_real, prompt_length=prompt_length, smoothing=0.0)
        for image in shown
    )
    return LmLook(*map(float, losses))


def _margin(logits: Tensor) -> Tensor:
    """Return by how much a match is likelier than none, (B,)."""
    return logits[:, 1] - logits[:, 0]


def _captions(
    image_embeds: Tensor, text: MedText, tokenizer: TextTokenizer, prompt: str
) -> list[str]:
    """Return the likeliest caption of each of (B, P, C) images."""
    ids = tokenizer.prompt_ids(prompt)
    prompt_ids = torch.tensor([ids] * len(image_embeds), device=image_embeds.device)
    config = DecodingConfig(end_id=tokenizer.end_id, pad_id=tokenizer.pad_id, min_length=len(ids))
    image = text.project_image(image_embeds, "decoder")
    state = text.begin(image, num_captions=1, max_length=config.max_length)
    decoder = Decoder(text.step, DecoderState.reordered)
    return tokenizer.decode(greedy(decoder, state, prompt_ids, config), len(ids))
