"""Synthetic captions: BLIP's captioner, asked n times about each image (BLIP, Sec. 3.3).

A caption is a function of the weights, the image, the settings, and (seed, key, index): of no
batch, worker or order. What that rests on is said at `Captioner.caption`.

B images, n captions of an image, S side of what the model looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import BertTokenizer

from model.beam_search import BeamConfig
from model.capfilt import MedCaptioner
from model.captioning import CaptionDecoder
from model.checkpoints import load_captioner
from model.generation import DecodingConfig, NucleusConfig
from pipeline.image_decode import Pixels
from pipeline.model_configs import CaptionerConfig, Method
from pipeline.models import (
    ImagePreprocessor,
    bert_tokenizer,
    resolve_model,
    weights_fingerprint,
    with_commit,
)


@dataclass(frozen=True, slots=True)
class GeneratedCaption:
    """One caption of an image: its number among them, its text, its tokens without the prompt."""

    text: str
    index: int
    num_tokens: int


class Captioner:
    """A captioner on a device, with its tokenizer and preprocessing."""

    def __init__(
        self,
        model: MedCaptioner,
        tokenizer: BertTokenizer,
        preprocessor: ImagePreprocessor,
        config: CaptionerConfig,
        *,
        seed: int,
        fingerprint: str = "",
    ) -> None:
        """`model` is on its device and in its dtype; `fingerprint` is that of its weights.

        Raises ValueError for a prompt that the tokenizer does not know, or that leaves no room.
        """
        self.config = config
        self.preprocessor = preprocessor
        self.fingerprint = fingerprint
        self._tokenizer = tokenizer
        self.device = model.image_encoder.patches.weight.device
        ids = tokenizer(config.prompt)["input_ids"][:-1]  # without [SEP]
        self._check_prompt(ids)
        ids[0] = model.text.config.caption_start_id
        self._prompt_length = len(ids)
        self._decoding = self._decoding_config()
        self._decoder = CaptionDecoder(
            model.eval().requires_grad_(False),
            self._decoding,
            ids,
            seed=seed,
            num_captions=config.num_captions,
            is_compiled=config.is_compiled,
        )

    @classmethod
    def load(
        cls,
        config: CaptionerConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Return the captioner that `config` names. Raises ModelError or CheckpointError.

        Its own config says which commit a name on the hub stood for.
        """
        config = with_commit(config)
        folder = resolve_model(config)
        model = load_captioner(folder).to(device, dtype)
        return cls(
            model,
            bert_tokenizer(folder, model.text.config),
            ImagePreprocessor.of_folder(folder, model.image_encoder.config.image_size),
            config,
            seed=seed,
            fingerprint=weights_fingerprint(folder),
        )

    @property
    def images_at_once(self) -> int:
        """How many images are captioned together; calls with a multiple of it waste nothing."""
        return self._decoder.images_at_once

    def preprocess(self, pixels: Pixels) -> Tensor:
        """Return (3, S, S) float32 for (H, W, 3) RGB; safe to call from many threads."""
        return self.preprocessor(pixels)

    def caption(self, pixels: Tensor, keys: Sequence[str]) -> list[list[GeneratedCaption]]:
        """Return n captions for each of (B, 3, S, S) images; `keys` name their samples.

        In float32 on a CPU a caption is the same whatever is captioned with it: not a bit of its
        logits depends on that (see `model.captioning`). In bfloat16, and on accelerators, groups
        have one shape as well, so the same is to be expected, but rounding there is not tested.
        torch.OutOfMemoryError passes through, and groups are then half as large.
        """
        if len(pixels) != len(keys):
            raise ValueError(f"{len(pixels)} images with {len(keys)} keys")
        if not keys:
            return []
        ids = self._decoder.decode(pixels, keys).cpu()
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        special = torch.tensor([self._decoding.end_id, self._decoding.pad_id])
        counts = (~torch.isin(ids[:, self._prompt_length :], special)).sum(dim=1).tolist()
        each = self.config.num_captions
        rows = [
            GeneratedCaption(text[len(self.config.prompt) :].strip(), number % each, count)
            for number, (text, count) in enumerate(zip(texts, counts, strict=True))
        ]
        return [rows[start : start + each] for start in range(0, len(rows), each)]

    def _check_prompt(self, ids: list[int]) -> None:
        # It is cut off captions by its length, as in BLIP.
        read = self._tokenizer.decode(ids, skip_special_tokens=True)
        if len(read) != len(self.config.prompt.rstrip()):
            raise ValueError(
                f"the prompt {self.config.prompt!r} comes back from the tokenizer as {read!r}; "
                f"use plain words of its vocabulary with single spaces"
            )

    def _decoding_config(self) -> DecodingConfig:
        asked = self.config
        common: dict[str, Any] = {
            "end_id": self._tokenizer.sep_token_id,
            "pad_id": self._tokenizer.pad_token_id,
            "min_length": asked.min_length,
            "max_length": asked.max_length,
            "repetition_penalty": asked.repetition_penalty,
        }
        if asked.method is Method.NUCLEUS:
            return NucleusConfig(
                **common, top_p=asked.top_p, temperature=asked.temperature, top_k=asked.top_k
            )
        if asked.method is Method.BEAM:
            return BeamConfig(**common, num_beams=asked.num_beams)
        return DecodingConfig(**common)
