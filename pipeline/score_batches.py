"""How many images go through the models at a time: what fits, found by trying.

A GPU that runs out of memory costs one batch, which is repeated in halves, never the shard.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch

from pipeline.sample import ShardError

_log = logging.getLogger(__name__)
_PROBES = (2, 8)  # images; from two peaks follow what a batch costs and what each image does
_USABLE = 0.85  # of free memory; the rest is for captions longer than the probe's, and fragments


class BatchSize:
    """The number of images in a batch; it only ever falls."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_halved = 0

    def halve(self, where: str) -> None:
        """Halve it; raises ShardError when a batch is one image already."""
        if self.size == 1:
            raise ShardError(
                f"{where}: the device has not enough memory for one image; use a smaller model, "
                "fewer captions for an image, or a larger device"
            )
        _log.warning("%s: out of memory with %d images, going on with %d", where, self.size,
                     self.size // 2)  # fmt: skip
        self.size //= 2
        self.num_halved += 1


def run_within_memory(run: Callable[[], None]) -> bool:
    """Run; return whether the memory sufficed. What a failed attempt took is free on return."""
    try:
        run()
    except torch.OutOfMemoryError:
        is_enough = False
    else:
        is_enough = True
    # Not inside the handler: there the traceback would keep the attempt's tensors alive.
    if not is_enough and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return is_enough


def find_gpu_batch_size(run: Callable[[int], None], device: torch.device, max_size: int) -> int:
    """Return how many images a CUDA device is to process at a time, a power of two.

    `run` captions and scores a number of images. Its peaks at two sizes are drawn out to the memory
    that is free; then the size is tried. A power of two, so that what else is on the GPU rarely
    shows in it.
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


def _peak_bytes(run: Callable[[int], None], size: int, device: torch.device) -> int | None:
    """Return what `run` takes beyond what was taken before, or None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if not run_within_memory(partial(run, size)):
        return None
    peak: int = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def largest_that_runs(run: Callable[[int], None], size: int) -> int:
    """Return the first of the powers of two from `size` down for which the memory suffices."""
    size = 1 << (max(1, size).bit_length() - 1)
    while size > 1 and not run_within_memory(partial(run, size)):
        size //= 2
    return size
