"""CapFilt's two models: the captioner writes captions, the filter tells which match (BLIP, 3.3).

Both are MED fine-tuned for one purpose, each with the parts it needs and no more: the captioner has
no text encoder, the filter no decoder. Their weights are named as in `MedPretraining`, from which
both are fine-tuned.

Dims: B images, R = B * n texts (the n of an image side by side), T text tokens, P image tokens,
C image width, E joint width, V vocabulary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.losses import IGNORED, at_least_float32, label_smoothed, next_token_targets
from model.med import (
    DecoderState,
    Functionality,
    ImageKeysValues,
    MedConfig,
    MedText,
    starting_with,
)
from model.vision import ImageEncoder, VisionConfig, resize_positions

ENCODERS = frozenset({Functionality.UNIMODAL_ENCODER, Functionality.IMAGE_GROUNDED_ENCODER})


class MedCaptioner(nn.Module):
    """An image encoder and the image-grounded decoder: images in, captions out."""

    def __init__(self, vision: VisionConfig, med: MedConfig) -> None:
        super().__init__()
        _require_equal_widths(vision, med)
        self.image_encoder = ImageEncoder(vision)
        self.text = MedText(med, frozenset({Functionality.IMAGE_GROUNDED_DECODER}))

    def forward(
        self,
        pixels: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        *,
        prompt_length: int = 4,
        smoothing: float = 0.1,
    ) -> Tensor:
        """Return the language modelling loss of captions, a float32 scalar (BLIP, Sec. 3.2).

        `pixels` is (B, 3, image_size, image_size). `token_ids` (B, T) int64 is the prompt and the
        caption behind [CLS], which [DEC] replaces here; `text_is_real` (B, T) is bool. The first
        `prompt_length` tokens are no targets: [DEC] a picture of.
        """
        image = self.project_image(self.image_encoder(pixels))
        token_ids = starting_with(self.text.config.caption_start_id, token_ids)
        return caption_loss(
            self.text,
            image,
            token_ids,
            text_is_real,
            prompt_length=prompt_length,
            smoothing=smoothing,
        )

    def project_image(self, image_embeds: Tensor) -> ImageKeysValues:
        """Project (B, P, C) image tokens, once for all the captions of these images."""
        return self.text.project_image(image_embeds, "decoder")

    def begin(self, pixels: Tensor, *, num_captions: int = 1, max_length: int) -> DecoderState:
        """Look at (B, 3, image_size, image_size) images; return the state of R empty captions.

        `max_length` counts the prompt's tokens too. Read the prompt with `step` at one caption an
        image and `DecoderState.repeated` thereafter, where all captions share it.
        """
        image = self.project_image(self.image_encoder(pixels))
        return self.text.begin(image, num_captions=num_captions, max_length=max_length)

    def step(self, token_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read the next t tokens (R, t) of every caption; return (R, V) logits of what follows."""
        return self.text.step(token_ids, state)


class MedFilter(nn.Module):
    """An image encoder, the text encoder and two heads: does this text match this image?

    `match_*` is the ITM head on the image-grounded encoder, by which CapFilt keeps or drops;
    `similarity` is the ITC cosine, which is cheaper and coarser.
    """

    def __init__(
        self,
        vision: VisionConfig,
        med: MedConfig,
        *,
        joint_width: int = 256,
        functionalities: frozenset[Functionality] = ENCODERS,
    ) -> None:
        """`joint_width` is where image and text are compared by ITC."""
        super().__init__()
        _require_equal_widths(vision, med)
        self.image_encoder = ImageEncoder(vision)
        self.text = MedText(med, functionalities)
        self.vision_proj = nn.Linear(vision.width, joint_width)
        self.text_proj = nn.Linear(med.bert.width, joint_width)
        self.itm_head = nn.Linear(med.bert.width, 2)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return (B, P, C) tokens of (B, 3, image_size, image_size) images, for all scores."""
        image_embeds: Tensor = self.image_encoder(pixels)
        return image_embeds

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Return (B, E) float32, of length one, for (B, P, C) image tokens."""
        return joint_features(image_embeds, self.vision_proj)

    def text_features(self, token_ids: Tensor, text_is_real: Tensor) -> Tensor:
        """Return (R, E) float32, of length one, for texts (R, T) that start with [CLS]."""
        states = self.text.encode(token_ids, text_is_real, first_only=True)
        return joint_features(states, self.text_proj)

    def similarity(self, image_embeds: Tensor, token_ids: Tensor, text_is_real: Tensor) -> Tensor:
        """Return the ITC cosine of every text with its image, (R,) float32 in [-1, 1].

        `image_embeds` is (B, P, C), `token_ids` and `text_is_real` (R, T) with R = B * n.
        """
        images = self.image_features(image_embeds)  # (B, E)
        texts = self.text_features(token_ids, text_is_real).view(len(images), -1, images.shape[1])
        return (texts * images[:, None, :]).sum(dim=2).flatten()

    def match_logits(
        self,
        image: ImageKeysValues,
        token_ids: Tensor,
        text_is_real: Tensor,
        *,
        keeps_cls: bool = False,
    ) -> Tensor:
        """Return (R, 2) ITM logits of every text with its image; class 1 is a match.

        `image` is `text.project_image(image_embeds, "encoder")`, `token_ids` (R, T) int64. [ENC]
        takes the place of each first token, as in training and in the paper's evaluation.
        `keeps_cls` leaves [CLS], as BLIP's stand-alone scorer and transformers'
        BlipForImageTextRetrieval do: only to compare numbers with theirs.
        """
        if not keeps_cls:
            token_ids = starting_with(self.text.config.match_start_id, token_ids)
        states = self.text.encode_with_image(token_ids, text_is_real, image, first_only=True)
        logits: Tensor = self.itm_head(states[:, 0])
        return logits

    def match_probability(
        self,
        image_embeds: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        *,
        keeps_cls: bool = False,
    ) -> Tensor:
        """Return P(match) of every text with its image, (R,) float32 (BLIP, Sec. 3.3).

        `image_embeds` is (B, P, C) from `encode_image`; `token_ids` and `text_is_real` are (R, T),
        R = B * n. The paper drops a text below 0.5. `keeps_cls` is that of `match_logits`.
        """
        image = self.text.project_image(image_embeds, "encoder")
        logits = self.match_logits(image, token_ids, text_is_real, keeps_cls=keeps_cls)
        return at_least_float32(logits).softmax(dim=1)[:, 1]


def load_part(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `model` has from a larger model's weights, under the same names.

    So a captioner or a filter starts from a `MedPretraining`'s state dict, at its own resolution:
    position embeddings are resized, as BLIP does to go from 224 to 384 pixels. Raises ValueError
    that lists what is missing there.
    """
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"the weights to start from lack {', '.join(missing)}")
    found = {name: state[name] for name in wanted}
    for name in found:
        if name.endswith("image_encoder.positions"):  # the momentum encoder has them too
            side = round((wanted[name].shape[1] - 1) ** 0.5)
            found[name] = resize_positions(found[name], side=side, align_corners=False)
    model.load_state_dict(found)


def joint_features(states: Tensor, projection: nn.Linear) -> Tensor:
    """Return the normalised projection of the first of (B, S, D) states: (B, E) float32."""
    return F.normalize(at_least_float32(projection(states[:, 0])), dim=-1)


def caption_loss(
    text: MedText,
    image: ImageKeysValues,
    token_ids: Tensor,
    text_is_real: Tensor,
    *,
    prompt_length: int = 1,
    smoothing: float = 0.1,
) -> Tensor:
    """Return the label-smoothed loss of predicting captions from images, a float32 scalar.

    `token_ids` (B, T) start with [DEC]. The first `prompt_length` tokens are no targets; [DEC],
    which nothing precedes, never is one.
    """
    logits = text.decode(token_ids[:, :-1], text_is_real[:, :-1], image)  # (B, T-1, V)
    targets = next_token_targets(token_ids, text_is_real)
    asked = torch.arange(1, token_ids.shape[1], device=targets.device) >= prompt_length
    return label_smoothed(logits, targets.masked_fill(~asked, IGNORED), smoothing=smoothing)


def _require_equal_widths(vision: VisionConfig, med: MedConfig) -> None:
    if vision.width != med.image_width:
        raise ValueError(
            f"the image encoder is {vision.width} wide, but the text stack was configured for "
            f"image_width={med.image_width}"
        )
