"""How many images a device has memory for, found by trying."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

_PROBES = (2, 8)  # images; from two peaks follow what a batch costs and what each image does
_USABLE = 0.85  # of free memory; the rest is for captions longer than the probe's, and fragments
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


def find_gpu_batch_size(run: Callable[[int], object], device: torch.device, max_size: int) -> int:
    """Return how many images a CUDA device is to process at a time, a power of two.

    `run` captions and scores a number of images, and returns something. Its peaks at two sizes are
    drawn out to the memory that is free; then the size is tried. A power of two, so that what else
    is on the GPU rarely shows in it.
    """
    peaks = []
    for size in _PROBES:
        peak = _peak_bytes(run, size, device)
        if peak is None:
            return largest_that_runs(run, min(size // 2, max_size))
        peaks.append(peak)
    free = torch.cuda.mem_get_info(device)[0] * _USABLE
    return largest_that_runs(run, min(fitting(_PROBES, peaks, free), max_size))


def fitting(sizes: tuple[int, int], peaks: list[int], free: float) -> int:
    """Return the largest number of images for which the line through two peaks is within `free`."""
    for_each = max(1.0, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]))
    for_all = peaks[0] - for_each * sizes[0]
    return max(1, int((free - for_all) / for_each))


def _peak_bytes(run: Callable[[int], object], size: int, device: torch.device) -> int | None:
    """Return what `run` takes beyond what was taken before, or None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if within_memory(partial(run, size)) is None:
        return None
    peak: int = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def largest_that_runs(run: Callable[[int], object], size: int) -> int:
    """Return the first of the powers of two from `size` down for which the memory suffices."""
    size = 1 << (max(1, size).bit_length() - 1)
    while size > 1 and within_memory(partial(run, size)) is None:
        size //= 2
    return size
