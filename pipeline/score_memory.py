"""How many images a device has memory for, found by trying."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

Result = TypeVar("Result")


def within_memory(run: Callable[[], Result]) -> Result | None:
    """Return what `run` does, or None where memory did not suffice; what it took is then free."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass
    # Not inside the handler: there the traceback would keep the attempt's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def largest_that_runs(run: Callable[[int], object], size: int) -> int:
    """Return the first of the powers of two from `size` down for which the memory suffices.

    `run` captions and scores so many images, and returns something. From the top, because models
    take images in groups and get by with smaller ones once a group was too much. Powers of two, so
    that what else is on the device rarely shows in the result.
    """
    size = 1 << (size.bit_length() - 1)
    while size > 1 and within_memory(partial(run, size)) is None:
        size //= 2
    return size
