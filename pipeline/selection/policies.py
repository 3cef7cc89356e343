"""Policies: which of an image's captions are kept, and which of those is the best.

All of them see the captions that passed the rules. Human captions are kept whatever the policy.

M captions of a block, in the order human, web, synthetic within an image.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.sample import ShardError
from pipeline.selection.candidates import HUMAN, SYNTHETIC, WEB, Block, Captions
from pipeline.selection.checks import Check, Codes, mark
from pipeline.selection.config import Policy, SelectConfig

# What each policy cannot do without; an expression may live with what is missing here and there.
NEEDS = {Policy.BLIP: "itm", Policy.FILTER_ONLY: "itm", Policy.BLIP2: "clip"}
MODEL_OF = {"itm": "filter", "itc": "filter", "clip": "clip"}
_Ranks = NDArray[np.float64]


class Condition(Protocol):
    """Says of each caption of a block whether an expression is true; see `expression`."""

    def __call__(self, block: Block) -> NDArray[np.bool_]:
        """Return (M,) flags."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A block's captions in order: by image, the kept ones first, of those the best first."""

    order: NDArray[np.int64]  # (M,) positions
    num_candidates: NDArray[np.int32]  # (N,) captions of each image
    num_kept: NDArray[np.int32]  # (N,) of those the kept ones


def apply_policy(
    block: Block, config: SelectConfig, condition: Condition | None, codes: Codes
) -> _Ranks:
    """Note in `codes`, (M,), what the policy drops; return (M,) what the kept are ranked by.

    Higher is better; equal ones stand in the order human, web, synthetic, then by index. Raises
    ShardError where a score is missing.
    """
    captions = block.captions
    policy = config.policy
    unscored = np.zeros(len(captions))
    if policy in (Policy.WEB_ONLY, Policy.FILTER_ONLY):
        mark(codes, captions.origin == SYNTHETIC, Check.OTHER_ORIGIN)
    if policy is Policy.CAPTION_ONLY:
        mark(codes, captions.origin == WEB, Check.OTHER_ORIGIN)
    if policy in (Policy.BLIP, Policy.FILTER_ONLY):
        itm = _needed(captions, "itm", policy, codes)
        # In the precision in which it is stored: what is stored of 0.7 is at least 0.7.
        fails = ~(itm >= np.float32(config.itm_threshold))
        mark(codes, fails & (captions.origin != HUMAN), Check.ITM_BELOW_THRESHOLD)
        return itm.astype(np.float64)
    if policy is Policy.BLIP2:
        return _choose_top(captions, config.top_k, codes)
    if policy is Policy.EXPRESSION:
        assert condition is not None, "the configuration sees to it"
        is_wanted = condition(block) | (captions.origin == HUMAN)
        mark(codes, ~is_wanted, Check.EXPRESSION_NOT_TRUE)
        return _by_any_score(captions)
    return unscored


def put_in_order(captions: Captions, codes: Codes, ranks: _Ranks, num_images: int) -> Chosen:
    """Return how the captions of N images are listed; dropped ones keep the sidecar's order."""
    is_kept = codes == Check.PASSED
    is_ranked = is_kept & (captions.origin != HUMAN)
    value = np.where(is_ranked, -np.nan_to_num(ranks, nan=-np.inf), 0.0)
    position = np.arange(len(captions))
    # Human captions first, in their order: no score of ours says which of them is the best.
    order = np.lexsort((position, captions.origin, value, is_ranked, ~is_kept, captions.row))
    return Chosen(
        order=order,
        num_candidates=np.bincount(captions.row, minlength=num_images).astype(np.int32),
        num_kept=np.bincount(captions.row[is_kept], minlength=num_images).astype(np.int32),
    )


def _needed(captions: Captions, name: str, policy: Policy, codes: Codes) -> NDArray[np.float32]:
    """Return (M,) scores, none of them missing where one decides."""
    values = captions.scores[name]
    is_judged = (codes == Check.PASSED) & (captions.origin != HUMAN)
    missing = np.flatnonzero(is_judged & np.isnan(values))
    if len(missing):
        raise ShardError(
            f"sample {captions.name(int(missing[0]))}: it has no {name} score, which policy "
            f"'{policy}' needs; score the shard with a {MODEL_OF[name]} model first"
        )
    return values


def _choose_top(captions: Captions, top_k: int, codes: Codes) -> _Ranks:
    """Keep the best k by CLIP of each image's distinct captions (BLIP-2, Sec. 3.4)."""
    clip = _needed(captions, "clip", Policy.BLIP2, codes).astype(np.float64)
    is_in_pool = (codes == Check.PASSED) & (captions.origin != HUMAN)
    pool = np.flatnonzero(is_in_pool)
    if not len(pool):
        return clip
    # Which of equal texts stays is the first: the web's, then the lower index.
    text = captions.table["text"].take(pool).combine_chunks().dictionary_encode()
    number = pc.cast(text.indices, "int64").to_numpy()
    _, first = np.unique(captions.row[pool] * len(text.dictionary) + number, return_index=True)
    is_repeated = is_in_pool.copy()
    is_repeated[pool[first]] = False
    mark(codes, is_repeated, Check.DUPLICATE)
    pool = np.sort(pool[first])
    order = pool[np.lexsort((pool, captions.origin[pool], -clip[pool], captions.row[pool]))]
    rows = captions.row[order]
    begin = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    place = np.arange(len(rows)) - np.repeat(begin, np.diff(np.append(begin, len(rows))))
    is_beaten = np.zeros(len(captions), bool)
    is_beaten[order[place >= top_k]] = True
    mark(codes, is_beaten, Check.BELOW_TOP_K)
    return clip


def _by_any_score(captions: Captions) -> _Ranks:
    """Return ITM where there is one; CLIP decides among those that have none."""
    itm, clip = captions.scores["itm"], captions.scores["clip"]
    if not np.isnan(itm).all():
        return itm.astype(np.float64)
    return clip.astype(np.float64)
