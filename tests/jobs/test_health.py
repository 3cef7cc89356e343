"""Warnings come when something is wrong, say what to do, and not before there is reason."""

from collections import Counter

from jobs import health
from jobs.health import SuccessRate
from pipeline.download_outcome import DownloadOutcome, HostOutcome


def shard(rows, kept, reason="not_found"):
    host = HostOutcome(num_kept=kept, causes=Counter({("failed", reason): rows - kept}))
    return DownloadOutcome(hosts={"host": host})


def warnings(*shards):
    rate = SuccessRate()
    return [rate.add(each) for each in shards]


def test_a_web_that_is_as_bad_as_ever_is_no_news():
    assert warnings(*[shard(1000, 400)] * 9) == [None] * 9


def test_a_collapse_is_told_with_its_commonest_cause():
    *before, after = warnings(shard(1000, 700), shard(1000, 720), shard(1000, 100, "dns_failure"))
    assert before == [None, None]
    assert "10% of the last 1,000 rows kept, 71% before" in after
    assert '900 ended as "dns_failure"' in after
    assert "capfilt retry" in after


def test_a_run_that_keeps_nothing_from_the_start_is_told_too():
    (warning,) = warnings(shard(1000, 10, "connect_failed"))
    assert "1% of the last 1,000 rows kept" in warning


def test_a_handful_of_rows_proves_nothing():
    assert warnings(*[shard(10, 9)] * 5, *[shard(10, 0)] * 5) == [None] * 10


def test_a_shard_that_existed_counts_for_nothing():
    assert warnings(DownloadOutcome()) == [None]


def test_gpus_that_wait_for_shards_are_told_who_is_slow():
    told = health.starved("score", "download", num_ready=0, busy=100, wait=300)
    assert "waited 75% of the time" in told
    assert "run.download.max_actors" in told
    assert health.starved("score", "download", num_ready=3, busy=100, wait=300) is None
    assert health.starved("score", "download", num_ready=0, busy=300, wait=100) is None
    assert health.starved("score", "download", num_ready=0, busy=1, wait=30) is None


def test_gpus_that_wait_for_decoding_are_told_what_to_give_them():
    told = health.decoding("score", waits=50, busy=100)
    assert "50% of the time for decoded images" in told
    assert "score.num_decoders" in told
    assert health.decoding("score", waits=5, busy=100) is None


def test_a_stage_without_a_place_says_what_it_wants():
    told = health.unplaced("score", seconds=90, wants="1 CPUs, 1 GPUs")
    assert "no actor has found a place for 90 s; each wants 1 CPUs, 1 GPUs" in told
    assert health.unplaced("score", seconds=30, wants="") is None
