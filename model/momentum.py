"""What ITC compares a batch with: a slowly moving copy of the encoders and a queue of the past.

After MoCo and ALBEF (BLIP, Sec. 3.2). Everything here is without gradient.
Dims: B pairs of this rank, N pairs of all ranks, K queue columns, T text tokens, E joint width.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model.capfilt import ENCODERS, joint_features
from model.med import MedConfig, MedText
from model.vision import ImageEncoder, VisionConfig

NO_IMAGE = -100  # in the queue's ids before anything was enqueued; no image has it


class MomentumEncoder(nn.Module):
    """A copy of the image encoder, the text encoder and their projections.

    It moves only by `follow`. Its parameters do not require gradients.
    """

    def __init__(
        self,
        vision: VisionConfig,
        med: MedConfig,
        *,
        joint_width: int,
        decay: float = 0.995,
        follows_training_mode: bool = True,
    ) -> None:
        """`decay` is the share of itself that the copy keeps at each step.

        With `follows_training_mode`, dropout and stochastic depth are as active here as in the
        model around it, as in the reference; without, never: the targets are less noisy then.
        """
        super().__init__()
        self.follows_training_mode = follows_training_mode
        self.image_encoder = ImageEncoder(vision)
        # Only texts alone are encoded here. The cross-attention, never run, is kept and moved with
        # the rest so that a file of BLIP's pretraining survives a round trip whole.
        self.text = MedText(med, ENCODERS)
        self.vision_proj = nn.Linear(vision.width, joint_width)
        self.text_proj = nn.Linear(med.bert.width, joint_width)
        self._decay = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.requires_grad_(False)
        self.train(True)

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, token_ids: Tensor, text_is_real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return image and text features of a batch, each (B, E) float32 of length one."""
        images = joint_features(self.image_encoder(pixels), self.vision_proj)
        states = self.text.encode(token_ids, text_is_real, first_only=True)
        return images, joint_features(states, self.text_proj)

    @torch.no_grad()
    def copy_from(self, online: nn.Module) -> None:
        """Start as what `online` is now; its parameters of the same names are the source."""
        for own, source in self._pairs(online):
            own.copy_(source)

    @torch.no_grad()
    def follow(self, online: nn.Module) -> None:
        """Move a step: own = decay * own + (1 - decay) * online, once per optimiser step."""
        own, source = zip(*self._pairs(online), strict=True)
        self._decay(list(own), list(source), None)

    def train(self, mode: bool = True) -> Self:
        """Follow the mode of the model around it, or stay in evaluation mode."""
        return super().train(mode and self.follows_training_mode)

    def _pairs(self, online: nn.Module) -> list[tuple[Tensor, Tensor]]:
        sources = dict(online.named_parameters())
        return [(own, sources[name]) for name, own in self.named_parameters()]


class FeatureQueue(nn.Module):
    """The newest K image and text features of all ranks, with the ids of their images.

    A ring: columns are overwritten from `pointer` on. It starts as random directions that belong to
    no image. All ranks hold the same columns, for they enqueue what was gathered. `image_feats` and
    `text_feats` are (E, K) float32, `image_ids` (1, K) and `pointer` (1,) int64.
    """

    image_feats: Tensor
    text_feats: Tensor
    image_ids: Tensor
    pointer: Tensor

    def __init__(self, *, joint_width: int, size: int) -> None:
        super().__init__()
        self.size = size
        for name in ("image_feats", "text_feats"):
            columns = nn.functional.normalize(torch.randn(joint_width, size), dim=0)
            self.register_buffer(name, columns)
        self.register_buffer("image_ids", torch.full((1, size), NO_IMAGE))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def require_divisible(self, num_pairs: int) -> None:
        """Raise ValueError unless `num_pairs`, what one step enqueues, divides the queue's size.

        Otherwise the ring's oldest columns would be split between two steps.
        """
        if self.size and self.size % num_pairs:
            raise ValueError(
                f"queue_size {self.size} is not a multiple of the global batch of {num_pairs} "
                f"pairs (batch size per rank x ranks x accumulated micro-batches); choose "
                f"queue_size {max(self.size // num_pairs, 1) * num_pairs} or another batch size"
            )

    @torch.no_grad()
    def enqueue(self, image_feats: Tensor, text_feats: Tensor, image_ids: Tensor) -> None:
        """Overwrite the oldest columns with (N, E) features and (N,) ids of all ranks' pairs."""
        num_pairs = len(image_ids)
        self.require_divisible(num_pairs)
        if not self.size:  # a batch is then compared with itself alone
            return
        offset = torch.arange(num_pairs, device=self.pointer.device)
        columns = (self.pointer + offset) % self.size
        self.image_feats.index_copy_(1, columns, image_feats.t().to(self.image_feats.dtype))
        self.text_feats.index_copy_(1, columns, text_feats.t().to(self.text_feats.dtype))
        self.image_ids.index_copy_(1, columns, image_ids[None])
        self.pointer.copy_((self.pointer + num_pairs) % self.size)
