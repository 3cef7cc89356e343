"""BLIP-2's first stage: a frozen image encoder and a Q-Former learn to represent images for text.

One image pass, one text pass, a matching pass over three pairs a sample, and a captioning pass on
the queries of the first (BLIP-2, Sec. 3.2). Each image is projected for cross-attention once.
Dims: B pairs of this rank, N pairs of all ranks, Q query tokens, T text tokens, P image tokens,
I image width, D Q-Former width, E joint width, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import collectives, losses
from model.losses import Negatives
from model.qformer import CaptionCache, ImageKeysValues, QFormer, QFormerConfig, QueryStates
from model.vision import LnVision


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Config:
    """Sizes and constants of stage 1; the defaults are the paper's and the released code's."""

    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    joint_width: int = 256  # where image and text are compared
    caption_start_id: int = 30522  # [DEC], which takes the place of [CLS] when captioning
    temperature: float = 0.07  # divides similarities; learned
    temperature_range: tuple[float, float] | None = None  # BLIP clamps to (0.001, 0.5); BLIP-2 not
    smoothing: float = 0.1  # of ITC and ITG targets
    gather_grad: bool = False  # True: ITC's gradient also reaches the side that is compared with


@dataclass(frozen=True, slots=True)
class Stage1Losses:
    """The three losses of this rank's batch, and what they were computed from.

    Losses are float32 scalars. `sim_i2t` and `sim_t2i` are (B, N) float32, over the temperature;
    `itm_logits` is (3B, 2): the true pairs, the texts with their negative images, the images with
    their negative texts; `itg_logits` is (B, T-1, V): position t predicts token t+1.
    """

    itc: Tensor
    itm: Tensor
    itg: Tensor
    sim_i2t: Tensor
    sim_t2i: Tensor
    itm_logits: Tensor
    itg_logits: Tensor
    negatives: Negatives

    @property
    def total(self) -> Tensor:
        """Return the sum that is minimised, all weights one (BLIP-2, Sec. 3.2)."""
        return self.itc + self.itm + self.itg


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """`embeds` (B, Q, D) are the queries' states, `feats` (B, Q, E) their normalised projection."""

    embeds: Tensor
    feats: Tensor


@dataclass(frozen=True, slots=True)
class _World:
    """The pairs of all ranks, N of them, of which this rank's begin at `first`."""

    token_ids: Tensor  # (N, T)
    text_is_real: Tensor  # (N, T)
    same_image: Tensor  # (B, N): which of them show the image of each local pair
    first: int


class Stage1(nn.Module):
    """Image encoder, its trainable LayerNorm, the Q-Former and the heads of three objectives.

    `image_encoder` maps pixels to (B, P, I) states, in any floating dtype; whether it is frozen is
    its own affair. Works on one process or on all ranks of the default process group, whose B and T
    must be equal, at any B from one up, and under autocast.
    """

    def __init__(self, config: Stage1Config, image_encoder: nn.Module) -> None:
        super().__init__()
        width = config.qformer.width
        self.config = config
        self.image_encoder = image_encoder
        self.ln_vision = LnVision(config.qformer.image_width)
        self.qformer = QFormer(config.qformer)
        self.vision_proj = nn.Linear(width, config.joint_width)
        self.text_proj = nn.Linear(width, config.joint_width)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def forward(
        self,
        pixels: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        image_ids: Tensor,
        negatives: Negatives | None = None,
    ) -> Stage1Losses:
        """Return ITC, ITM and ITG of a batch of pairs (BLIP-2, Sec. 3.2).

        `pixels` is what the image encoder takes; `token_ids` (B, T) int64 starts with [CLS];
        `text_is_real` (B, T) is bool. `image_ids` (B,) int64 names each image: pairs that share an
        id are positives of each other in ITC and never negatives in ITM; -1 (unknown) is unlike
        all others. `negatives` replaces the draw. With a single pair, or where all pairs share an
        id, the negatives are left out of ITM. Raises ValueError for other shapes or dtypes, and on
        every rank when B or T differ between ranks.
        """
        self._check(token_ids, text_is_real, image_ids)
        world = self._gather_pairs(token_ids, text_is_real, image_ids)
        image = self.encode_image(pixels)  # (B, P, I)
        seen = self.qformer.project_image(image)
        queries = self.qformer.encode_image(seen)
        first_state = self.qformer.encode_text(token_ids, text_is_real, first_only=True)[:, 0]
        sim_i2t, sim_t2i = self._similarities(queries, first_state)
        if negatives is None:
            negatives = _draw_negatives(sim_i2t, sim_t2i, world.same_image)
        strangers = self._negative_images(image, seen, negatives.image_for_text)
        itm_logits = self._match(world, (seen, strangers), negatives.text_for_image)
        itg_logits = self._caption(queries, token_ids, text_is_real)
        smoothing = self.config.smoothing
        targets = losses.next_token_targets(token_ids, text_is_real)
        itc = [
            losses.contrastive_loss(sim, world.same_image, smoothing=smoothing)
            for sim in (sim_i2t, sim_t2i)
        ]
        return Stage1Losses(
            itc=(itc[0] + itc[1]) / 2,
            itm=_matching_loss(itm_logits, has_negative=~world.same_image.all(dim=1)),
            itg=losses.label_smoothed(itg_logits, targets, smoothing=smoothing),
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            itm_logits=itm_logits,
            itg_logits=itg_logits,
            negatives=negatives,
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the image encoder's states after `ln_vision`, (B, P, I)."""
        normalised: Tensor = self.ln_vision(self.image_encoder(pixels))
        return normalised

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """Return what the queries alone make of images: states and retrieval features."""
        embeds = self.qformer.encode_image(self._see(pixels)).embeds
        return ImageFeatures(embeds, _normalised(self.vision_proj(embeds)))

    def text_features(self, token_ids: Tensor, text_is_real: Tensor) -> Tensor:
        """Return (B, T, E) normalised projections of all text states; state 0 is ITC's vector."""
        return _normalised(self.text_proj(self.qformer.encode_text(token_ids, text_is_real)))

    def multimodal_features(
        self, pixels: Tensor, token_ids: Tensor, text_is_real: Tensor
    ) -> Tensor:
        """Return (B, Q, D): the queries' states when they see image and text."""
        return self.qformer.encode_pair(token_ids, text_is_real, [self._see(pixels)])

    def match_logits(
        self, images: ImageKeysValues, token_ids: Tensor, text_is_real: Tensor
    ) -> Tensor:
        """Return (M, 2) matching logits, class 1 = match, averaged over queries (Sec. 3.2).

        `images` come from `self.qformer.project_image`; `.shared_by(n)` scores n neighbouring
        texts against each image without projecting or copying it again.
        """
        return self._itm_logits(self.qformer.encode_pair(token_ids, text_is_real, [images]))

    def begin_caption(self, pixels: Tensor) -> CaptionCache:
        """Read images for captioning: a cache of no tokens, one row an image.

        `cache.rows(index)` repeats rows for several captions or beams and reorders them later.
        """
        return CaptionCache(self.qformer.encode_image(self._see(pixels)).layers)

    def caption_step(self, token_ids: Tensor, cache: CaptionCache) -> tuple[Tensor, CaptionCache]:
        """Return logits of the next token, (N, V), and the cache to give to the next step.

        `token_ids` (N, L) int64 are all tokens so far, `caption_start_id` first and no padding;
        those that the cache holds already are not computed again.
        """
        states, cache = self.qformer.decode_step(token_ids[:, cache.num_tokens :], cache)
        return self.qformer.next_token_logits(states[:, -1]), cache

    def _see(self, pixels: Tensor) -> ImageKeysValues:
        return self.qformer.project_image(self.encode_image(pixels))

    def _gather_pairs(self, token_ids: Tensor, text_is_real: Tensor, image_ids: Tensor) -> _World:
        """Know every rank's texts and image ids: integers, in one exchange."""
        size, length = token_ids.shape
        sizes = {"the batch size": size, "the text length": length}
        collectives.require_equal_sizes(sizes, token_ids.device)
        columns = torch.cat((token_ids, text_is_real.long(), image_ids[:, None]), dim=1)
        texts, is_real, ids = torch.split(collectives.gather(columns), [length, length, 1], dim=1)
        first = collectives.rank() * size
        return _World(texts, is_real.bool(), losses.same_image(image_ids, ids[:, 0], first), first)

    def _similarities(self, queries: QueryStates, first_state: Tensor) -> tuple[Tensor, Tensor]:
        """Return image-to-text and text-to-image similarities over temperature, each (B, N).

        The side compared with is a constant unless `gather_grad`, on one process too: the released
        code's gradient, which one-sided gathering makes the same at every world size.
        """
        image_feats = _normalised(self.vision_proj(queries.embeds))  # (B, Q, E)
        text_feats = _normalised(self.text_proj(first_state))  # (B, E)
        gather = collectives.gather_with_grad if self.config.gather_grad else collectives.gather
        temperature = self._clamped_temperature()
        sim_i2t = losses.query_similarity(image_feats, gather(text_feats)) / temperature
        sim_t2i = losses.query_similarity(gather(image_feats), text_feats).t() / temperature
        return sim_i2t, sim_t2i

    def _clamped_temperature(self) -> Tensor:
        """Return the temperature, first put back into its range when it has one.

        The parameter itself moves: one clamped on the way would get no gradient to come back by.
        """
        if self.config.temperature_range is not None and self.training:
            low, high = self.config.temperature_range
            with torch.no_grad():
                self.temperature.clamp_(low, high)
        return losses.at_least_float32(self.temperature)

    def _negative_images(
        self, image: Tensor, seen: ImageKeysValues, wanted: Tensor
    ) -> ImageKeysValues:
        """Return the drawn images, B of the global batch's N, with gradient to their owners.

        Alone, their projections are at hand. From other ranks come the tokens, of the drawn images
        only, to be projected here: they are smaller than the projections for all layers.
        """
        if collectives.world_size() == 1:
            return seen.rows(wanted)
        return self.qformer.project_image(collectives.exchange_rows(image, wanted))

    def _match(
        self, world: _World, images: tuple[ImageKeysValues, ImageKeysValues], wanted: Tensor
    ) -> Tensor:
        """Return (3B, 2) matching logits in one pass, ordered as `Stage1Losses` says.

        Inside the pass, each own image serves two neighbouring rows, its text and its negative one.
        """
        own, strangers = images
        size = own.num_images

        def rows(texts: Tensor) -> Tensor:
            mine = texts[world.first : world.first + size]
            pairs = torch.stack((mine, texts.index_select(0, wanted)), dim=1).flatten(0, 1)
            return torch.cat((pairs, mine))  # (3B, T)

        groups = [own.shared_by(2), strangers]
        states = self.qformer.encode_pair(rows(world.token_ids), rows(world.text_is_real), groups)
        logits = self._itm_logits(states)
        true, negative_text = logits[: 2 * size].view(size, 2, 2).unbind(dim=1)
        return torch.cat((true, logits[2 * size :], negative_text))

    def _itm_logits(self, states: Tensor) -> Tensor:
        """Return (M, 2): each query votes, the votes are averaged."""
        averaged: Tensor = self.itm_head(states).mean(dim=1)
        return averaged

    def _caption(self, queries: QueryStates, token_ids: Tensor, text_is_real: Tensor) -> Tensor:
        """Return (B, T-1, V) next-token logits; the last token predicts nothing."""
        start = torch.full_like(token_ids[:, :1], self.config.caption_start_id)
        captions = torch.cat((start, token_ids[:, 1:]), dim=1)
        states = self.qformer.decode(captions, text_is_real, queries.layers)
        return self.qformer.next_token_logits(states[:, :-1])

    @staticmethod
    def _check(token_ids: Tensor, text_is_real: Tensor, image_ids: Tensor) -> None:
        if token_ids.dim() != 2 or token_ids.dtype != torch.int64:
            raise ValueError(f"token_ids must be (B, T) int64, not {_describe(token_ids)}")
        if text_is_real.shape != token_ids.shape or text_is_real.dtype != torch.bool:
            raise ValueError(
                f"text_is_real must be {tuple(token_ids.shape)} bool, not {_describe(text_is_real)}"
            )
        if image_ids.shape != token_ids.shape[:1] or image_ids.dtype != torch.int64:
            raise ValueError(
                f"image_ids must be ({token_ids.shape[0]},) int64, -1 where unknown, "
                f"not {_describe(image_ids)}"
            )


def _draw_negatives(sim_i2t: Tensor, sim_t2i: Tensor, same_image: Tensor) -> Negatives:
    """Draw a hard negative image for each text and a text for each image at once (Sec. 3.2)."""
    forbidden = same_image.repeat(2, 1)
    weights = losses.negative_weights(torch.cat((sim_t2i, sim_i2t)), forbidden)  # (2B, N)
    return Negatives(*losses.draw(weights).chunk(2))


def _matching_loss(itm_logits: Tensor, has_negative: Tensor) -> Tensor:
    true = torch.ones_like(has_negative)
    is_match = torch.cat((true, ~true, ~true))  # (3B,)
    return losses.matching_loss(itm_logits, is_match, torch.cat((true, has_negative, has_negative)))


def _normalised(projected: Tensor) -> Tensor:
    return F.normalize(losses.at_least_float32(projected), dim=-1)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
