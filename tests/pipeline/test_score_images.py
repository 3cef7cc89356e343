"""Decoding ahead of the models, and how many images they see at a time."""

import random
import threading
import time

import pytest
import score_jobs as jobs
import torch

from pipeline.image_header import ImageReason
from pipeline.sample import SampleError, ShardError
from pipeline.score_batches import BatchSize
from pipeline.score_config import ScoreConfig
from pipeline.score_images import AheadLimits, DecodeAhead, ScoringStoppedError, decode_image
from pipeline.score_input import RawImage, RawRow
from pipeline.score_memory import largest_that_runs, within_memory
from pipeline.score_outcome import ScoreOutcome, ScoreTimes

NUM_DECODERS, MAX_READY = 3, 5


def image(number):
    return RawImage(RawRow(str(number), "web", None, "web"), SampleError("none", "none"))


class Shard:
    """Images that are read one by one, and who reads how far."""

    def __init__(self, num_images, fault=None):
        self._num_images = num_images
        self._fault = fault
        self.num_read = 0
        self.is_closed = False

    def images(self):
        try:
            for number in range(self._num_images):
                self.num_read += 1
                yield image(number)
            if self._fault is not None:
                raise self._fault
        finally:
            self.is_closed = True


def slow(raw):
    time.sleep(random.random() * 0.004)  # images overtake each other, as real ones do
    return int(raw.row.key)


def ahead(prepare=slow, should_stop=lambda: False):
    limits = AheadLimits(num_decoders=NUM_DECODERS, max_ready=MAX_READY)
    return DecodeAhead(prepare, limits, ScoreTimes(), should_stop)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("decode", "read-shard"))]


def test_images_come_in_the_order_they_were_read():
    assert list(ahead().work(Shard(100).images())) == list(range(100))
    assert threads() == []


def test_reading_goes_on_ahead_but_never_too_far():
    shard, seen = Shard(60), 0
    for _ in ahead(lambda raw: raw.row.key).work(shard.images()):
        seen += 1
        # What is ready, and one that was read and waits for room.
        assert shard.num_read <= seen + MAX_READY + 1
    assert seen == 60


def test_no_more_images_are_held_for_decoding_than_there_are_threads_for():
    shard = Shard(60)
    may_go_on, begun = threading.Event(), threading.Semaphore(0)

    def stuck(raw):
        begun.release()
        assert may_go_on.wait(timeout=60)
        return raw.row.key

    limits = AheadLimits(num_decoders=NUM_DECODERS, max_ready=50)
    working = DecodeAhead(stuck, limits, ScoreTimes(), lambda: False).work(shard.images())
    first = threading.Thread(target=lambda: next(working))
    first.start()
    for _ in range(NUM_DECODERS):
        assert begun.acquire(timeout=60)
    assert shard.num_read <= 2 * NUM_DECODERS + 1
    may_go_on.set()
    first.join()
    working.close()
    assert threads() == []


def test_who_stops_iterating_leaves_no_thread_behind():
    shard = Shard(1000)
    working = ahead().work(shard.images())
    assert next(working) == 0
    working.close()
    assert threads() == []
    assert shard.is_closed
    assert shard.num_read < 30


def test_what_breaks_while_reading_is_raised_after_the_images_before_it():
    working = ahead().work(Shard(20, ShardError("the tar is damaged")).images())
    assert [next(working) for _ in range(20)] == list(range(20))
    with pytest.raises(ShardError, match="the tar is damaged"):
        next(working)
    assert threads() == []


def test_what_breaks_in_a_thread_names_the_sample():
    def broken(raw):
        if raw.row.key == "7":
            raise RuntimeError("a bug")
        return raw.row.key

    with pytest.raises(ShardError, match="sample 7: RuntimeError: a bug"):
        list(ahead(broken).work(Shard(20).images()))
    assert threads() == []


def test_a_wait_for_images_can_be_stopped():
    is_asked, may_read = threading.Event(), threading.Event()

    def never_read():
        is_asked.set()
        assert may_read.wait(timeout=60)  # a disk that hangs
        yield image(0)

    def should_stop():
        if is_asked.is_set():
            may_read.set()
            return True
        return False

    with pytest.raises(ScoringStoppedError):
        list(ahead(should_stop=should_stop).work(never_read()))
    assert threads() == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (jobs.resized_header(jobs.picture(0, "PNG"), 60_000), ImageReason.TOO_MANY_PIXELS),
        (jobs.picture(0, "PNG", (300, 2)), ImageReason.ASPECT_TOO_LARGE),
        (jobs.picture(0)[:-30], ImageReason.TRUNCATED_IMAGE),
        (b"<svg onload='alert()'/>", ImageReason.FORMAT_REFUSED),
        (b"", ImageReason.NOT_AN_IMAGE),
    ],
)
def test_the_guard_of_downloads_stands_before_the_models_too(data, reason):
    with pytest.raises(SampleError) as caught:
        decode_image(data, ScoreConfig())
    assert caught.value.reason == reason


def test_all_of_an_images_pixels_are_decoded():
    assert decode_image(jobs.picture(0, size=(640, 480)), ScoreConfig()).shape == (480, 640, 3)


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "expected"), [(100, 64), (33, 32), (3, 2), (0, 1)])
def test_a_size_is_tried_before_it_is_taken(room, expected):
    tried = []

    def run(num_images):
        tried.append(num_images)
        if num_images > room:
            raise torch.OutOfMemoryError
        return num_images

    assert largest_that_runs(run, 90) == expected
    assert all(size in (64, 32, 16, 8, 4, 2) for size in tried)


def test_only_a_lack_of_memory_is_survived():
    def out_of_memory():
        raise torch.OutOfMemoryError

    def broken():
        raise ValueError("a bug")

    assert within_memory(lambda: 5) == 5
    assert within_memory(out_of_memory) is None
    with pytest.raises(ValueError, match="a bug"):
        within_memory(broken)


def test_a_batch_of_one_is_not_halved():
    batch = BatchSize(3)
    batch.halve("here")
    assert (batch.size, batch.num_halved) == (1, 1)
    with pytest.raises(ShardError, match="here: the device has not enough memory for one image"):
        batch.halve("here")


# --- what it came to -----------------------------------------------------------------------------


def outcome(num_images, seconds, batch_size):
    made = ScoreOutcome(elapsed_seconds=seconds, batch_size=batch_size)
    for _ in range(num_images):
        made.add_image([{"origin": "web", "verdict": "kept", "reason": ""}])
    made.add_image([{"origin": None, "verdict": "failed", "reason": "bad_image"}])
    made.times.caption = seconds / 2
    return made


def test_outcomes_add_up_one_after_the_other_and_side_by_side():
    total = ScoreOutcome()
    total.merge(outcome(3, 2.0, 8))
    total.merge(outcome(5, 4.0, 4))
    assert (total.num_images, total.num_kept) == (10, 8)
    assert total.causes == {("failed", "bad_image"): 2}
    assert total.captions == {"web": 8}
    assert (total.elapsed_seconds, total.times.caption, total.batch_size) == (6.0, 3.0, 4)
    total.merge(outcome(1, 10.0, 8), is_parallel=True)
    assert total.elapsed_seconds == 10.0


def test_an_empty_outcome_can_be_shown():
    assert ScoreOutcome().images_per_second == 0
    assert any("0 images" in line for line in ScoreOutcome().lines())
