"""Why a caption was not kept: the checks in the order in which they are made."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]


class Check(IntEnum):
    """What a caption did not pass. A later check was not made where an earlier one was not passed.

    The names, in lower case, are the reasons of the ledger, but for SCORED: there the sidecar's
    reason is taken over.
    """

    PASSED = 0
    SCORED = 1  # the scoring stage had dropped it
    IMAGE_TOO_SMALL = 2
    ASPECT_TOO_LARGE = 3
    NSFW = 4
    WATERMARK = 5
    TOO_SHORT = 6
    TOO_LONG = 7
    FILE_NAME = 8
    BOILERPLATE = 9
    FEW_LETTERS = 10
    OTHER_SCRIPT = 11
    REPETITION = 12
    OTHER_ORIGIN = 13  # the policy wants none of the kind
    DUPLICATE = 14
    BELOW_TOP_K = 15
    ITM_BELOW_THRESHOLD = 16
    EXPRESSION_NOT_TRUE = 17

    @property
    def reason(self) -> str:
        """The word that the ledger has for it."""
        return "" if self is Check.PASSED else self.name.lower()


REASONS = np.array([check.reason for check in Check], dtype=object)


def mark(codes: Codes, fails: NDArray[np.bool_], check: Check) -> None:
    """Note a check that some captions do not pass, where none was noted before."""
    codes[fails & (codes == Check.PASSED)] = check
