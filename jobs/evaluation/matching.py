"""How well a score tells right captions from wrong ones: ROC-AUC, precision and recall."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.roc import area_under_curve

_STEPS, _MOST = (0.01, 0.02, 0.05, 0.1, 0.2), 20
_THRESHOLDS = tuple(number / 20 for number in range(1, 20))


@dataclass(frozen=True, slots=True)
class AtThreshold:
    """What keeping captions from a score up comes to; None where nothing is kept, or is right."""

    threshold: float
    num_kept: int
    precision: float | None  # right captions among those kept
    recall: float | None  # kept ones among the right captions


@dataclass(frozen=True, slots=True)
class Matching:
    """A score against labels."""

    num_right: int
    num_wrong: int
    auc: float | None  # None with labels of one kind only
    thresholds: tuple[AtThreshold, ...]


def matching(
    scores: NDArray[np.floating], is_right: NDArray[np.bool_], at: Sequence[float] | None = None
) -> Matching:
    """Compare (n,) scores with (n,) labels, at every twentieth from 0 to 1 or at other thresholds.

    Raises ValueError for a score that is no number.
    """
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite; leave out captions that were not scored")
    num_right = int(is_right.sum())
    return Matching(
        num_right=num_right,
        num_wrong=len(is_right) - num_right,
        auc=area_under_curve(scores[is_right], scores[~is_right]),
        thresholds=tuple(
            _at(scores, is_right, each) for each in (_THRESHOLDS if at is None else at)
        ),
    )


def even_thresholds(scores: NDArray[np.floating]) -> list[float]:
    """Return at most twenty round numbers, evenly spaced, that span scores of any range."""
    low, high = float(scores.min()), float(scores.max())
    step = next((s for s in _STEPS if high - low <= (_MOST - 1) * s), _STEPS[-1])
    first, last = math.floor(low / step), math.floor(high / step)
    return [round(number * step, 2) for number in range(first, last + 1)][-_MOST:]


def _at(scores: NDArray[np.floating], is_right: NDArray[np.bool_], threshold: float) -> AtThreshold:
    is_kept = scores >= threshold
    num_kept, num_right = int(is_kept.sum()), int(is_right.sum())
    num_both = int((is_kept & is_right).sum())
    return AtThreshold(
        threshold=threshold,
        num_kept=num_kept,
        precision=num_both / num_kept if num_kept else None,
        recall=num_both / num_right if num_right else None,
    )
