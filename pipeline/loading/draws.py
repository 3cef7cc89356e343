"""Random numbers that belong to what they are for, not to when or where they are drawn.

Each draw names its purpose and its subject, so a batch comes out the same in any process, after any
restart. Only the raw bits of Philox are used: NumPy promises those for ever, its distributions not.
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_MANTISSA_BITS = 53


def draw(count: int, *subject: int | str) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) that depend on the subject alone: (count,) float64."""
    bits = _bits(count, subject) >> np.uint64(64 - _MANTISSA_BITS)
    return bits.astype(np.float64) * 2.0**-_MANTISSA_BITS


def permutation(count: int, *subject: int | str) -> npt.NDArray[np.int64]:
    """Return a permutation of `range(count)` that depends on the subject alone: (count,) int64."""
    return np.argsort(_bits(count, subject), kind="stable")


def hash63(*subject: int | str) -> int:
    """Return a number in [0, 2**63) that stands for the subject on any machine."""
    return int.from_bytes(_digest(subject, 8)) >> 1


def _bits(count: int, subject: tuple[int | str, ...]) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=int.from_bytes(_digest(subject, 16))).random_raw(count)


def _digest(subject: tuple[int | str, ...], size: int) -> bytes:
    # A name holds no NUL, so no two subjects have the same text.
    return blake2b("\0".join(map(str, subject)).encode(), digest_size=size).digest()
