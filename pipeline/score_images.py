"""Images decoded and made ready for the models by threads that run ahead of them, in tar order.

Memory is bounded by count, twice: of files that wait to be decoded, which may be large, and of
images that are ready, which are tensors of the models' sizes.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.image_decode import Pixels, decode
from pipeline.image_header import ImageReason, read_header
from pipeline.sample import SampleError, ShardError
from pipeline.score_config import ScoreConfig
from pipeline.score_input import RawImage
from pipeline.score_outcome import ScoreTimes

_POLL_SECONDS = 0.5  # how often a wait for an image looks whether it should stop
Ready = TypeVar("Ready")


class ScoringStoppedError(Exception):
    """Scoring was asked to stop: no shard was committed."""


def decode_image(data: bytes, config: ScoreConfig) -> Pixels:
    """Return all pixels of an image of a raw shard, (H, W, 3) RGB; raises SampleError.

    The same guard as at download: accepted formats only, the size judged before anything is
    decoded. EXIF has no say, for the images of a corpus were turned upright when they came in.
    """
    header = read_header(data)
    short, long = sorted((header.width, header.height))
    size = f"{header.width} x {header.height} pixels"
    if short * long > config.max_pixels:
        raise SampleError(ImageReason.TOO_MANY_PIXELS, f"{size}, over {config.max_pixels:,}")
    if long > config.max_aspect * short:
        raise SampleError(ImageReason.ASPECT_TOO_LARGE, f"{size}, over {config.max_aspect:g} to 1")
    return decode(data, header, min_width=header.width, min_height=header.height).pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadLimits:
    """How many threads decode, and how many images may be ready at most."""

    num_decoders: int
    max_ready: int


class DecodeAhead(Generic[Ready]):
    """Reads on one thread, prepares on several, and yields in order to whoever iterates."""

    def __init__(
        self,
        prepare: Callable[[RawImage], Ready],
        limits: AheadLimits,
        times: ScoreTimes,
        should_stop: Callable[[], bool],
    ) -> None:
        """`prepare` is called by many threads at once; what it raises fails the shard."""
        self._prepare = prepare
        self._limits = limits
        self._times = times
        self._should_stop = should_stop
        self._results: queue.SimpleQueue[Future[tuple[Ready, float]] | Exception | None] = (
            queue.SimpleQueue()
        )
        self._may_read = threading.Semaphore(2 * limits.num_decoders)
        self._has_room = threading.Semaphore(limits.max_ready)
        self._is_over = threading.Event()

    def work(self, images: Generator[RawImage, None, None]) -> Generator[Ready, None, None]:
        """Yield one result per image, in order. Raises ScoringStoppedError, and ShardError.

        Either way, and when the caller stops iterating, no thread is left behind.
        """
        with ThreadPoolExecutor(self._limits.num_decoders, thread_name_prefix="decode") as pool:
            reader = threading.Thread(target=self._read, args=(images, pool), name="read-shard")
            reader.start()
            try:
                while (result := self._next()) is not None:
                    yield result
            finally:
                self._is_over.set()
                self._has_room.release()
                reader.join()
                pool.shutdown(cancel_futures=True)

    def _next(self) -> Ready | None:
        """Wait for the next image; None after the last."""
        started_at = time.perf_counter()
        try:
            result = self._take()
            if result is None:
                return None
            if isinstance(result, Exception):
                raise result
            ready, seconds = result.result()  # raises what `prepare` raised
        finally:
            self._times.wait += time.perf_counter() - started_at
        self._times.decode += seconds
        self._has_room.release()
        return ready

    def _take(self) -> Future[tuple[Ready, float]] | Exception | None:
        while True:
            if self._should_stop():
                raise ScoringStoppedError("asked to stop")
            try:
                return self._results.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def _read(self, images: Generator[RawImage, None, None], pool: ThreadPoolExecutor) -> None:
        try:
            for image in self._timed(images):
                self._has_room.acquire()
                self._may_read.acquire()
                if self._is_over.is_set():
                    break
                self._results.put(pool.submit(self._prepare_one, image))
            self._results.put(None)
        except Exception as error:  # raised again where results are taken
            self._results.put(error)
        finally:
            images.close()

    def _timed(self, images: Iterator[RawImage]) -> Iterator[RawImage]:
        while True:
            started_at = time.perf_counter()
            image = next(images, None)
            self._times.read += time.perf_counter() - started_at
            if image is None:
                return
            yield image

    def _prepare_one(self, image: RawImage) -> tuple[Ready, float]:
        started_at = time.perf_counter()
        try:
            return self._prepare(image), time.perf_counter() - started_at
        except Exception as error:
            raise ShardError(f"sample {image.row.key}: {type(error).__name__}: {error}") from error
        finally:
            self._may_read.release()
