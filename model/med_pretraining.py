"""How MED learns: ITC against a momentum queue, ITM with hard negatives, LM (BLIP, Sec. 3.2).

One module for pretraining and for fine-tuning the filter, which differ by their `MedObjectives`.
The captioner learns by LM alone: `MedCaptioner.forward`. Each image is encoded and projected for
cross-attention once; its true text, the text drawn against it and its caption all look at that.

Dims: B pairs of this rank, N pairs of all ranks, K queue columns, T text tokens, P image tokens,
E joint width, V vocabulary.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import collectives, losses
from model.capfilt import MedFilter, caption_loss
from model.losses import Negatives
from model.med import Functionality, ImageKeysValues, MedConfig, starting_with
from model.momentum import FeatureQueue, MomentumEncoder
from model.vision import VisionConfig


class HardNegatives(StrEnum):
    """Where ITM's negatives are drawn from, and by which similarity."""

    PRETRAINING = "this rank's pairs, by similarity to momentum features, with a floor of 1e-4"
    THIS_RANK = "this rank's pairs, by similarity of online features"
    ALL_RANKS = "all ranks' pairs, by similarity of online features"


@dataclass(frozen=True, kw_only=True, slots=True)
class MedObjectives:
    """Constants of the objectives; the defaults are those of BLIP's pretraining."""

    joint_width: int = 256
    queue_size: int = 57600  # K; a multiple of the global batch, or 0 for none
    momentum: float = 0.995
    is_momentum_in_training_mode: bool = True  # its dropout is active, as in the reference
    temperature: float = 0.07  # divides similarities; learned
    temperature_range: tuple[float, float] = (0.001, 0.5)
    positives_by_image_id: bool = False  # ITC: all columns of the same image, not only its pair
    hard_negatives: HardNegatives = HardNegatives.PRETRAINING
    has_lm: bool = True
    smoothing: float = 0.1  # of LM's targets


PRETRAINING = MedObjectives()
# Fine-tuning for retrieval on COCO gives the filter; on Flickr30k negatives are of THIS_RANK.
FILTER_FINE_TUNING = MedObjectives(
    positives_by_image_id=True, hard_negatives=HardNegatives.ALL_RANKS, has_lm=False
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MedStep:
    """What changes from step to step: the trust in soft targets, and gradient accumulation."""

    alpha: float | Tensor  # weight of the momentum model's soft targets, 0 to 1
    micro_batch: int = 0  # which of the batches whose gradients one optimiser step adds up
    num_micro_batches: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.micro_batch < self.num_micro_batches:
            raise ValueError(
                f"micro_batch is {self.micro_batch} of {self.num_micro_batches}; the first is 0"
            )

    @property
    def is_first(self) -> bool:
        """Whether the optimiser has just moved the weights."""
        return self.micro_batch == 0

    @property
    def is_last(self) -> bool:
        """Whether the optimiser moves the weights next."""
        return self.micro_batch == self.num_micro_batches - 1


@dataclass(frozen=True, slots=True)
class MedLosses:
    """The losses of this rank's batch, and what they were computed from.

    Losses are float32 scalars; `lm` is zero where it is no objective. `sim_i2t` and `sim_t2i` are
    (B, B+K) float32, over the temperature. `itm_logits` is (3B, 2): the true pairs, the texts with
    their negative images, the images with their negative texts.
    """

    itc: Tensor
    itm: Tensor
    lm: Tensor
    sim_i2t: Tensor
    sim_t2i: Tensor
    itm_logits: Tensor
    negatives: Negatives

    @property
    def total(self) -> Tensor:
        """Return the sum that is minimised, all weights one (BLIP, Sec. 3.2)."""
        return self.itc + self.itm + self.lm


@dataclass(frozen=True, slots=True)
class _Pairs:
    """A batch on its way through the objectives."""

    image_embeds: Tensor  # (B, P, C)
    image_feats: Tensor  # (B, E)
    text_feats: Tensor  # (B, E)
    token_ids: Tensor  # (B, T)
    text_is_real: Tensor  # (B, T)
    image_ids: Tensor  # (B,)


@dataclass(frozen=True, slots=True)
class _Similarities:
    """What ITC compares, over the temperature, float32 (B, B+K): this batch first, then the queue.

    `i2t` and `t2i` set online features against momentum features; those with `_targets` are what
    they should become, a distribution a row.
    """

    i2t: Tensor
    t2i: Tensor
    i2t_targets: Tensor
    t2i_targets: Tensor

    def loss(self) -> Tensor:
        """Return ITC, the mean of both directions."""
        i2t = F.cross_entropy(self.i2t, self.i2t_targets)
        return (i2t + F.cross_entropy(self.t2i, self.t2i_targets)) / 2


@dataclass(frozen=True, slots=True)
class _NegativeWeights:
    """How likely each text is drawn for an image, and each image for a text: (B, B) or (B, N)."""

    i2t: Tensor
    t2i: Tensor

    def matching_loss(self, itm_logits: Tensor) -> Tensor:
        """Return ITM of (3B, 2) logits, without the negatives of pairs that have none."""
        batch = len(self.i2t)
        has_image, has_text = self.t2i.any(dim=1), self.i2t.any(dim=1)
        counts = torch.cat((torch.ones_like(has_image), has_image, has_text))
        is_match = torch.arange(3 * batch, device=counts.device) < batch
        return losses.matching_loss(itm_logits, is_match, counts)


class MedPretraining(MedFilter):
    """A MED with all it needs to learn; it can also score, as any `MedFilter`.

    After loading weights that carry no momentum copy, call `reset_momentum`.
    """

    def __init__(
        self, vision: VisionConfig, med: MedConfig, objectives: MedObjectives = PRETRAINING
    ) -> None:
        functionalities = set(Functionality)
        if not objectives.has_lm:
            functionalities.remove(Functionality.IMAGE_GROUNDED_DECODER)
        super().__init__(
            vision,
            med,
            joint_width=objectives.joint_width,
            functionalities=frozenset(functionalities),
        )
        self.objectives = objectives
        self.temperature = nn.Parameter(torch.tensor(objectives.temperature))
        self.momentum = MomentumEncoder(
            vision,
            med,
            joint_width=objectives.joint_width,
            decay=objectives.momentum,
            follows_training_mode=objectives.is_momentum_in_training_mode,
        )
        self.queue = FeatureQueue(joint_width=objectives.joint_width, size=objectives.queue_size)
        self._to_enqueue: list[tuple[Tensor, ...]] = []
        self.reset_momentum()

    def reset_momentum(self) -> None:
        """Let the momentum encoder start as the encoders are now."""
        self.momentum.copy_from(self)

    def forward(
        self,
        pixels: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        image_ids: Tensor,
        step: MedStep,
        negatives: Negatives | None = None,
    ) -> MedLosses:
        """Return the losses of a batch of pairs; moves the momentum encoder and the queue.

        `pixels` is (B, 3, image_size, image_size); `token_ids` (B, T) int64 starts with [CLS];
        `text_is_real` (B, T) is bool. `image_ids` (B,) int64 names each image: pairs that share an
        id are never negatives of each other in ITM and, in fine-tuning, positives in ITC; -1
        (unknown) is unlike all others. `negatives` replaces the draw. With a single pair, or where
        all pairs share an id, the negatives are left out of ITM.

        The momentum encoder moves at the first micro-batch of an optimiser step, and the queue
        takes the features of all of them at the last: k accumulated micro-batches leave both as
        one batch of k times the size would. Call it once for each, in training only.

        Raises ValueError for other shapes or dtypes, for a queue that the global batch does not
        divide, and on every rank when B or T differ between ranks.
        """
        self._check(token_ids, text_is_real, image_ids, step)
        self._clamp_temperature()
        image_embeds = self.encode_image(pixels)  # (B, P, C)
        image_feats = self.image_features(image_embeds)
        text_feats = self.text_features(token_ids, text_is_real)
        pairs = _Pairs(image_embeds, image_feats, text_feats, token_ids, text_is_real, image_ids)
        if step.is_first:
            self.momentum.follow(self)
        image_feats_m, text_feats_m = self._momentum_feats(pairs, pixels)
        compared = self._compare(pairs, image_feats_m, text_feats_m, step.alpha)
        self._enqueue(image_feats_m, text_feats_m, image_ids, step)
        weights = self._negative_weights(pairs, compared)
        if negatives is None:
            negatives = Negatives(losses.draw(weights.t2i), losses.draw(weights.i2t))
        image = self.text.project_image(image_embeds, "encoder")
        itm_logits = self._match(pairs, image, negatives)
        itc, itm = compared.loss(), weights.matching_loss(itm_logits)
        lm = self._caption(pairs, image) if self.objectives.has_lm else itm.new_zeros(())
        return MedLosses(itc, itm, lm, compared.i2t, compared.t2i, itm_logits, negatives)

    def _momentum_feats(self, pairs: _Pairs, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the momentum encoder's features of images and texts, each (B, E) float32.

        A copy that keeps nothing of itself is the encoders: their own features serve, and what
        dropout was drawn for them.
        """
        if self.objectives.momentum == 0:
            return pairs.image_feats.detach().float(), pairs.text_feats.detach().float()
        feats: tuple[Tensor, Tensor] = self.momentum(pixels, pairs.token_ids, pairs.text_is_real)
        return feats

    def _check(
        self, token_ids: Tensor, text_is_real: Tensor, image_ids: Tensor, step: MedStep
    ) -> None:
        batch, length = token_ids.shape
        if text_is_real.shape != (batch, length) or text_is_real.dtype != torch.bool:
            raise ValueError(
                f"text_is_real is {text_is_real.dtype} {tuple(text_is_real.shape)}; token_ids ask "
                f"for torch.bool {(batch, length)}"
            )
        if image_ids.shape != (batch,) or image_ids.dtype != torch.int64:
            raise ValueError(
                f"image_ids are {image_ids.dtype} {tuple(image_ids.shape)}; a batch of {batch} "
                f"asks for torch.int64 {(batch,)}, {losses.UNKNOWN_IMAGE} where one is not known"
            )
        sizes = {"batch size": batch, "text length": length}
        collectives.require_equal_sizes(sizes, token_ids.device)
        self.queue.require_divisible(batch * collectives.world_size() * step.num_micro_batches)

    @torch.no_grad()
    def _clamp_temperature(self) -> None:
        """Keep the parameter itself in range: one clamped on the way would get no gradient."""
        self.temperature.clamp_(*self.objectives.temperature_range)

    def _compare(
        self, pairs: _Pairs, image_feats_m: Tensor, text_feats_m: Tensor, alpha: float | Tensor
    ) -> "_Similarities":
        """Compare this batch's features with this batch's momentum features and the queue's."""
        # Half precision would overflow the softmax: a cosine over the temperature reaches 1000.
        with torch.autocast(pairs.image_feats.device.type, enabled=False):
            image_keys = torch.cat((image_feats_m.t(), self.queue.image_feats), dim=1)  # (E, B+K)
            text_keys = torch.cat((text_feats_m.t(), self.queue.text_feats), dim=1)
            i2t = pairs.image_feats @ text_keys / self.temperature  # (B, B+K)
            t2i = pairs.text_feats @ image_keys / self.temperature
            with torch.no_grad():
                pair = self._positives(pairs.image_ids)
                soft_i2t = (image_feats_m @ text_keys / self.temperature).softmax(dim=1)
                soft_t2i = (text_feats_m @ image_keys / self.temperature).softmax(dim=1)
                i2t_targets = alpha * soft_i2t + (1 - alpha) * pair
                t2i_targets = alpha * soft_t2i + (1 - alpha) * pair
        return _Similarities(i2t, t2i, i2t_targets, t2i_targets)

    def _positives(self, image_ids: Tensor) -> Tensor:
        """Return which columns are right without a momentum model's advice, (B, B+K) rows of one.

        The pair itself in pretraining; with `positives_by_image_id` all columns of its image.
        """
        if not self.objectives.positives_by_image_id:
            return torch.eye(
                len(image_ids), len(image_ids) + self.queue.size, device=image_ids.device
            )
        columns = torch.cat((image_ids, self.queue.image_ids[0]))
        positive = losses.same_image(image_ids, columns, first=0).float()
        return positive / positive.sum(dim=1, keepdim=True)

    def _enqueue(
        self, image_feats_m: Tensor, text_feats_m: Tensor, image_ids: Tensor, step: MedStep
    ) -> None:
        """Gather what is to be enqueued; do so when the optimiser step is complete."""
        if step.is_first:
            self._to_enqueue = []  # of a step that was broken off
        gathered = tuple(map(collectives.gather, (image_feats_m, text_feats_m, image_ids)))
        self._to_enqueue.append(gathered)
        if step.is_last:
            images, texts, ids = zip(*self._to_enqueue, strict=True)
            self.queue.enqueue(torch.cat(images), torch.cat(texts), torch.cat(ids))
            self._to_enqueue = []

    @torch.no_grad()
    def _negative_weights(self, pairs: _Pairs, compared: "_Similarities") -> "_NegativeWeights":
        """Return how likely each pair is drawn against each of this rank's."""
        batch, kind = len(pairs.image_ids), self.objectives.hard_negatives
        if kind is HardNegatives.PRETRAINING:
            forbidden = losses.same_image(pairs.image_ids, pairs.image_ids, first=0)
            return _NegativeWeights(
                losses.floored_negative_weights(compared.i2t[:, :batch], forbidden),
                losses.floored_negative_weights(compared.t2i[:, :batch], forbidden),
            )
        images, texts, ids, first = pairs.image_feats, pairs.text_feats, pairs.image_ids, 0
        if kind is HardNegatives.ALL_RANKS:
            images, texts, ids = map(collectives.gather, (images, texts, ids))
            first = collectives.rank() * batch
        forbidden = losses.same_image(pairs.image_ids, ids, first)  # (B, N)
        with torch.autocast(images.device.type, enabled=False):
            i2t = pairs.image_feats @ texts.t() / self.temperature
            t2i = pairs.text_feats @ images.t() / self.temperature
        return _NegativeWeights(
            losses.negative_weights(i2t, forbidden), losses.negative_weights(t2i, forbidden)
        )

    def _match(self, pairs: _Pairs, image: ImageKeysValues, negatives: Negatives) -> Tensor:
        """Return ITM logits of the true pairs, the drawn images and the drawn texts, (3B, 2)."""
        token_ids, text_is_real = pairs.token_ids, pairs.text_is_real
        drawn_ids, drawn_is_real, drawn_image = self._drawn(pairs, image, negatives)
        # Both texts of an image look at it together, so it is not copied for the second.
        both_ids = torch.stack((token_ids, drawn_ids), dim=1).flatten(0, 1)  # (2B, T)
        both_are_real = torch.stack((text_is_real, drawn_is_real), dim=1).flatten(0, 1)
        own_image = self.match_logits(image, both_ids, both_are_real).view(-1, 2, 2)
        other_image = self.match_logits(drawn_image, token_ids, text_is_real)
        return torch.cat((own_image[:, 0], other_image, own_image[:, 1]))

    def _drawn(
        self, pairs: _Pairs, image: ImageKeysValues, negatives: Negatives
    ) -> tuple[Tensor, Tensor, ImageKeysValues]:
        """Return the drawn texts, (B, T) twice, and the drawn images' keys and values."""
        image_for_text, text_for_image = negatives.image_for_text, negatives.text_for_image
        token_ids, text_is_real = pairs.token_ids, pairs.text_is_real
        is_here = self.objectives.hard_negatives is not HardNegatives.ALL_RANKS
        if is_here or collectives.world_size() == 1:
            drawn_image = tuple(layer.rows(image_for_text) for layer in image)
        else:
            token_ids, text_is_real = map(collectives.gather, (token_ids, text_is_real))
            arrived = collectives.exchange_rows(pairs.image_embeds, image_for_text)
            drawn_image = self.text.project_image(arrived, "encoder")
        return token_ids[text_for_image], text_is_real[text_for_image], drawn_image

    def _caption(self, pairs: _Pairs, image: ImageKeysValues) -> Tensor:
        """Return the language modelling loss of the true pairs."""
        if not self.text.shares_image_projection:
            image = self.text.project_image(pairs.image_embeds, "decoder")
        token_ids = starting_with(self.text.config.caption_start_id, pairs.token_ids)
        return caption_loss(
            self.text, image, token_ids, pairs.text_is_real, smoothing=self.objectives.smoothing
        )
