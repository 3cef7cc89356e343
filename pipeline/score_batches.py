"""How many images go through the models at a time.

A GPU that runs out of memory costs one batch, which is repeated in halves, never the shard.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.sample import SampleError, ShardError

_log = logging.getLogger(__name__)
_MAX_LOST_IN_BATCH = 1000  # images that no model sees; they wait for those that one does


class Image(Protocol):
    """What is asked of an image here."""

    @property
    def lost(self) -> SampleError | None:
        """Why no model sees it."""


_Image = TypeVar("_Image", bound=Image)


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


def batches(images: Iterable[_Image], batch: BatchSize) -> Iterator[list[_Image]]:
    """Yield runs of images of which as many as a batch holds are for the models."""
    group: list[_Image] = []
    num_seen = 0
    for image in images:
        group.append(image)
        num_seen += image.lost is None
        if num_seen >= batch.size or len(group) - num_seen >= _MAX_LOST_IN_BATCH:
            yield group
            group, num_seen = [], 0
    if group:
        yield group


def num_leading(images: Sequence[Image], max_seen: int) -> int:
    """Return how many images to take so that the models see at most `max_seen` of them."""
    num_seen = 0
    for number, image in enumerate(images):
        num_seen += image.lost is None
        if num_seen > max_seen:
            return number
    return len(images)
