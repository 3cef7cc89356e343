"""The objectives of BLIP and BLIP-2 as pure functions: contrast, matching, language modelling.

Dims: B pairs of this rank, N pairs of all ranks (rank-major), Q query tokens, T text tokens,
E joint width, V vocabulary. Similarities, losses and sampling weights are float32 whatever the
features are (float64 stays): in half precision a similarity over a small temperature overflows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that no loss counts
UNKNOWN_IMAGE = -1  # the id of an image that nobody identified: unlike every other, also another -1


@dataclass(frozen=True, slots=True)
class Negatives:
    """Which pair of the global batch each of this rank's pairs was set against, for ITM.

    Both are (B,) int64 in [0, N).
    """

    image_for_text: Tensor
    text_for_image: Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values as float32, wider ones as they are."""
    return values if values.dtype == torch.float64 else values.float()


def token_losses(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of each target, float32, in the shape of `targets`.

    `logits` is (..., V) and `targets` (...) int64, `IGNORED` where nothing is asked: zero there.
    With smoothing e a token costs -(1-e) log p_target - e mean_v log p_v.
    """
    flat = F.cross_entropy(
        at_least_float32(logits.flatten(0, -2)),
        targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="none",
    )
    return flat.view_as(targets)


def label_smoothed(logits: Tensor, targets: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Return the mean of `token_losses` over the targets that count, a float32 scalar.

    Zero, not NaN, when none does (a batch of captions that are all prompt).
    """
    counted = (targets != IGNORED).sum().clamp_min(1)
    return token_losses(logits, targets, smoothing=smoothing).sum() / counted


def next_token_targets(token_ids: Tensor, text_is_real: Tensor) -> Tensor:
    """Return what each position but the last should predict: (B, T-1) int64, IGNORED for padding.

    The end token is a target (BLIP, Sec. 3.2; BLIP-2, Sec. 3.2).
    """
    return token_ids[:, 1:].masked_fill(~text_is_real[:, 1:], IGNORED)


def query_similarity(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """Return each image's best query for each text (BLIP-2, Sec. 3.2), not divided by temperature.

    `image_feats` is (I, Q, E) and `text_feats` (N, E), both normalised; returns (I, N) float32.
    """
    with torch.autocast(image_feats.device.type, enabled=False):
        per_query = at_least_float32(image_feats) @ at_least_float32(text_feats).t()  # (I, Q, N)
    best: Tensor = per_query.max(dim=1).values
    return best


def same_image(image_ids: Tensor, all_image_ids: Tensor, first: int) -> Tensor:
    """Say which pairs of the global batch show the image of each local pair: (B, N) bool.

    `image_ids` (B,) and `all_image_ids` (N,) are int64; `first` is the global number of local pair
    0. A pair always equals itself; `UNKNOWN_IMAGE` equals nothing else. Such pairs are positives
    for ITC and never negatives for ITM.
    """
    equal = (image_ids[:, None] == all_image_ids) & (image_ids != UNKNOWN_IMAGE)[:, None]
    here = torch.arange(first, first + image_ids.shape[0], device=image_ids.device)
    there = torch.arange(all_image_ids.shape[0], device=image_ids.device)
    return equal | (here[:, None] == there)


def contrastive_loss(similarity: Tensor, positive: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Return the smoothed cross entropy of each row against its positives, a float32 scalar.

    `similarity` is (B, N), over the temperature; `positive` (B, N) bool shares the target of a row
    among its positives. With one positive a row this is plain label smoothing.
    """
    similarity = at_least_float32(similarity)
    shares = positive.to(similarity.dtype) / positive.sum(dim=1, keepdim=True)
    return F.cross_entropy(similarity, shares, label_smoothing=smoothing)


def negative_weights(similarity: Tensor, forbidden: Tensor) -> Tensor:
    """Return how likely each pair is drawn as a row's hard negative, (B, N) float32 (BLIP-2).

    The softmax of the similarity over what is allowed; exactly zero where `forbidden`, and never
    NaN: a similarity that is NaN counts as zero, an infinite one as the largest, and a row that
    forbids all has only zeros.
    """
    finite = torch.nan_to_num(similarity.detach().float())
    weights = finite.masked_fill(forbidden, torch.finfo(torch.float32).min).softmax(dim=1)
    return weights.masked_fill(forbidden, 0.0)


def floored_negative_weights(
    similarity: Tensor, forbidden: Tensor, *, floor: float = 1e-4
) -> Tensor:
    """Return BLIP's sampling weights, (B, N) float32: softmax over all, plus a floor, then masked.

    Not normalised (BLIP, Sec. 3.2, as released). Zero where `forbidden`; no NaN, as above.
    """
    finite = torch.nan_to_num(similarity.detach().float())
    return (finite.softmax(dim=1) + floor).masked_fill(forbidden, 0.0)


@torch.library.custom_op("capfilt::clocks", mutates_args=())
def _clocks(like: Tensor) -> Tensor:
    """Return exponential clocks; to torch.compile one operator, so that it draws as without it."""
    return torch.empty_like(like).exponential_()


@_clocks.register_fake
def _clocks_shape(like: Tensor) -> Tensor:
    return torch.empty_like(like)


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one column for each row in proportion to its weight; returns (B,) int64.

    One race of exponential clocks decides all rows at once. `torch.multinomial` runs the same race
    but first reads the weights back to check them, which stops the device. A column of zero weight
    is never drawn while its row has another; a row of zeros yields column 0.
    """
    clocks: Tensor
    if generator is None:
        clocks = _clocks(weights.detach())
    else:
        clocks = torch.empty_like(weights).exponential_(generator=generator)
    # A clock at exactly zero would make 0/0 of a forbidden column, and argmax takes NaN for best.
    return (weights / clocks.clamp_min_(torch.finfo(weights.dtype).tiny)).argmax(dim=1)


def matching_loss(logits: Tensor, is_match: Tensor, counts: Tensor) -> Tensor:
    """Return the mean cross entropy of match against no match over the pairs that count.

    `logits` is (M, 2), class 1 = match; `is_match` (M,) bool; `counts` (M,) bool is False for a
    pair that has to be left out, such as the negative of a batch of one. A float32 scalar.
    """
    each = F.cross_entropy(at_least_float32(logits), is_match.long(), reduction="none")  # (M,)
    return (each * counts).sum() / counts.sum().clamp_min(1)
