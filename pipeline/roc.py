"""How well a score tells right from wrong: the area under its ROC curve, for all who ask."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Scores = NDArray[np.floating[Any]]


def area_under_curve(right: _Scores, wrong: _Scores) -> float | None:
    """Return how likely a right one's score is above a wrong one's; ties count half.

    Scores are (n,) and (m,), finite, in any order. None where either has no values.
    """
    if not len(right) or not len(wrong):
        return None
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, "left") + np.searchsorted(ordered, right, "right")
    return float(below.sum() / (2 * len(right) * len(wrong)))
