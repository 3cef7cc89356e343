"""CLIP similarity: transformers' CLIPModel, each image and each distinct text once.

B images, E width of the space where image and text are compared, S side of what the model sees.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from pipeline.model_configs import ModelConfig
from pipeline.models import (
    ImagePreprocessor,
    ModelError,
    any_tokenizer,
    resolve_model,
    weights_fingerprint,
)

# Texts go through the tower in groups of one size, padded to one of a few lengths, so that a text's
# rounding does not depend on what it is scored with.
_TEXTS_AT_ONCE = 8
_LENGTH_STEP = 16


class ClipScorer:
    """CLIP on a device: cosines of images and texts."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        preprocessor: ImagePreprocessor,
        *,
        fingerprint: str = "",
    ) -> None:
        """`model` is on its device and in its dtype; `fingerprint` is that of its weights."""
        self.preprocessor = preprocessor
        self.fingerprint = fingerprint
        self._tokenizer = tokenizer
        self.device, self._dtype = model.device, model.dtype
        untyped: Any = model
        self._model = untyped.eval().requires_grad_(False)
        self._images_at_once = 1 if self.device.type == "cpu" else 32
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Return the CLIP that `config` names. Raises ModelError."""
        folder = resolve_model(config)
        try:
            model: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} cannot be loaded as CLIP: {error}") from error
        size = model.config.vision_config.image_size
        return cls(
            model.to(device=device, dtype=dtype),
            any_tokenizer(folder),
            ImagePreprocessor.of_folder(folder, size, is_middle_cut=True),
            fingerprint=weights_fingerprint(folder),
        )

    @torch.inference_mode()
    def similarities(
        self, pixels: Tensor, texts: Sequence[Sequence[str]]
    ) -> list[list[float | None]]:
        """Return the cosine of each text with its image; `pixels` is (B, 3, S, S).

        Every image has a text.
        """
        distinct = list(dict.fromkeys(text for each in texts for text in each))
        rows = {text: row for row, text in enumerate(distinct)}
        try:
            images, features = self._image_features(pixels), self._text_features(distinct)
        except torch.OutOfMemoryError:
            self._images_at_once = max(1, self._images_at_once // 2)
            raise
        return [
            (features[[rows[text] for text in each]] * image).sum(dim=1).tolist()
            for image, each in zip(images, texts, strict=True)
        ]

    def _image_features(self, pixels: Tensor) -> Tensor:
        """Return (B, E) float32 of length one."""
        parts = []
        for group in torch.split(pixels, self._images_at_once):
            missing = self._images_at_once - len(group)
            padded = F.pad(group, (0, 0, 0, 0, 0, 0, 0, missing)).to(self.device, self._dtype)
            output = self._model.get_image_features(pixel_values=padded).pooler_output
            parts.append(output[: len(group)])
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        """Return (number of texts, E) float32 of length one."""
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)
        ids: list[list[int]] = encoded["input_ids"]
        by_length: dict[int, list[int]] = {}
        for row, each in enumerate(ids):
            steps = -(-len(each) // _LENGTH_STEP) * _LENGTH_STEP
            by_length.setdefault(min(steps, self._max_tokens), []).append(row)
        features: dict[int, Tensor] = {}
        for length, rows in sorted(by_length.items()):
            for start in range(0, len(rows), _TEXTS_AT_ONCE):
                group = rows[start : start + _TEXTS_AT_ONCE]
                output = self._text_group([ids[row] for row in group], length)
                features |= dict(zip(group, output, strict=True))
        stacked = torch.stack([features[row] for row in range(len(ids))])
        return F.normalize(stacked.float(), dim=-1)

    def _text_group(self, ids: Sequence[Sequence[int]], length: int) -> Tensor:
        """Return the features of a group. Attention is causal, so padding on the right is unseen.

        The model finds a text's end as its first end token; the rows that fill up are copies.
        """
        end_id = self._model.config.text_config.eos_token_id
        filler = self._tokenizer.eos_token_id if end_id == 2 else end_id
        full = [*ids, *[ids[0]] * (_TEXTS_AT_ONCE - len(ids))]
        rows = torch.tensor([[*row, *[filler] * (length - len(row))] for row in full])
        output = self._model.get_text_features(input_ids=rows.to(self.device)).pooler_output
        features: Tensor = output[: len(ids)]
        return features
