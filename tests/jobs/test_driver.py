"""A run on real actors: what dies is replaced, what fails is counted, what is declared holds."""

import logging
import threading
import time
from collections import Counter

import pytest
import ray
from ray_box import by_value, ray_cluster
from small_stages import Box

from jobs.driver import work_on_ray
from jobs.errors import RunError, UserError
from jobs.in_process import work_in_process
from jobs.ray_start import RayPlace
from jobs.run_config import PoolConfig, RunConfig

PLACE = RayPlace(is_own=False, has_gpus=True)
NO_GPUS = PoolConfig(num_gpus=0)
TWO = RunConfig(workers=2, score=NO_GPUS, idle_seconds=1)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(num_cpus=4, num_gpus=1) as started:
        by_value("small_stages")
        yield started


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def on_ray(config, place=PLACE):
    return lambda stages, board, watching: work_on_ray(stages, board, watching, config, place)


def run(box, stages, num_shards, config=TWO, **options):
    return box.run(stages, num_shards, config, on_ray(config), **options)


def attempts(box):
    return Counter(note["index"] for note in box.notes("began"))


@pytest.mark.usefixtures("cluster")
class TestOnRay:
    def test_every_shard_goes_through_every_stage(self, box):
        watching = run(box, [box.stage(n) for n in range(3)], 6)
        assert [box.shards(folder) for folder in ("raw", "captions", "clean")] == [
            list(range(6))
        ] * 3
        assert [stage.num_new for stage in watching.working] == [6, 6, 6]
        assert all(account.busy_seconds > 0 for account in watching.accounts.values())

    def test_scoring_begins_before_the_last_download(self, box):
        run(box, [box.stage(0, seconds=0.1), box.stage(1)], 12)
        began = [note["at"] for note in box.notes("began") if note["stage"] == "score"]
        downloaded = [note["at"] for note in box.notes("made") if note["stage"] == "download"]
        assert min(began) < max(downloaded)

    def test_no_more_shards_are_staged_than_allowed(self, box):
        config = TWO.model_copy(update={"max_shards_ahead": 3, "idle_seconds": 30.0})
        run(box, [box.stage(0), box.stage(1, seconds=0.1)], 12, config)
        staged = most = 0
        for note in box.notes():
            staged += (note["what"], note["stage"]) == ("began", "download")
            staged -= (note["what"], note["stage"]) == ("made", "score")
            most = max(most, staged)
        assert most <= 3
        # Those that were held back for a moment were not ended and started again.
        assert len(box.notes("opened")) <= 4

    def test_a_killed_worker_costs_its_own_shard_one_attempt_and_no_other_any(self, box):
        watching = run(box, [box.stage(does={2: ["dies"]})], 8)
        assert attempts(box) == {**dict.fromkeys(range(8), 1), 2: 2}
        assert watching.working[0].failures == {}
        assert box.shards() == list(range(8))

    def test_a_shard_that_kills_every_worker_is_set_aside_and_the_others_are_made(self, box):
        watching = run(box, [box.stage(does={1: ["dies"] * 9})], 5)
        assert attempts(box) == {**dict.fromkeys(range(5), 1), 1: 3}
        (failure,) = watching.working[0].failures.values()
        assert (failure.attempts, failure.problem.kind) == (3, "death")
        assert box.shards() == [0, 2, 3, 4]

    def test_bad_data_is_tried_three_times_and_then_set_aside(self, box):
        watching = run(box, [box.stage(does={0: ["bad"] * 9, 1: ["bad"]})], 3)
        assert attempts(box) == {0: 3, 1: 2, 2: 1}
        (failure,) = watching.working[0].failures.values()
        assert failure.problem.message == "shard raw/web/00000: bad data"

    def test_a_bug_is_not_tried_again_and_is_shown_once_with_a_count(self, box, caplog):
        watching = run(box, [box.stage(does={n: ["bug"] for n in range(4)})], 6)
        assert attempts(box) == dict.fromkeys(range(6), 1)
        assert len(watching.working[0].failures) == 4
        shown = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert len(shown) == 1
        assert 'KeyError("what is missing")' in shown[0] or "what is missing" in shown[0]
        assert "_misbehave" in shown[0]
        assert list(watching.bugs.counts.values()) == [4]

    def test_when_storage_is_away_the_run_waits_and_blames_no_shard(self, box):
        config = TWO.model_copy(update={"attempts": 1})
        watching = run(box, [box.stage(does={0: ["storage"], 1: ["storage"]})], 2, config)
        assert watching.working[0].failures == {}
        assert box.shards() == [0, 1]

    def test_a_mistake_in_the_recipe_ends_the_run_at_once(self, box):
        with pytest.raises(UserError, match="no such model"):
            run(box, [box.stage(opening="user")], 3)
        with pytest.raises(UserError, match="makes no sense"):
            run(box, [box.stage(does={0: ["user"]})], 1)

    def test_workers_that_cannot_start_are_not_started_for_ever(self, box):
        with pytest.raises(RunError, match="cannot start"):
            run(box, [box.stage(opening="bug")], 3)
        with pytest.raises(RunError, match="cannot start"):
            run(box, [box.stage(opening="dies")], 3, TWO.model_copy(update={"workers": 1}))

    def test_a_straggler_is_begun_again_and_the_run_does_not_wait_for_it(self, box):
        config = TWO.model_copy(update={"straggler_seconds": 0.5, "straggler_factor": 1.0})
        started_at = time.monotonic()
        run(box, [box.stage(does={3: ["hangs"]})], 6, config)
        assert time.monotonic() - started_at < 60
        assert attempts(box)[3] == 2
        assert box.shards() == list(range(6))

    def test_asked_to_stop_it_finishes_what_it_holds_and_begins_nothing(self, box):
        stop = threading.Event()

        def should_stop():
            if box.notes("began"):
                stop.set()
            return stop.is_set()

        watching = run(box, [box.stage(seconds=1.0)], 20, should_stop=should_stop)
        assert watching.is_stopped
        assert 0 < len(box.shards()) <= 4
        assert len(box.notes("began")) == len(box.notes("made"))
        run(box, [box.stage()], 20)
        assert box.shards() == list(range(20))

    def test_what_does_not_finish_in_time_is_cut_off_and_made_by_the_next_run(self, box):
        config = TWO.model_copy(update={"drain_seconds": 0.5})
        stage = box.stage(does={0: ["hangs"]})
        watching = run(box, [stage], 1, config, should_stop=lambda: bool(box.notes("began")))
        assert watching.is_stopped
        assert box.shards() == []
        run(box, [stage], 1)
        assert box.shards() == [0]

    def test_the_status_of_a_run_names_its_stages_and_its_actors_work(self, box):
        watching = run(box, [box.stage(0), box.stage(1)], 4)
        download, score = watching.heart.status.stages
        assert (download.shards_done, download.shards_total) == (4, 4)
        assert score.shard_seconds.keys() == {"median", "p90", "max"}
        assert score.wait_seconds > 0


class TestResources:
    """Fake GPUs are numbers that Ray counts, as it does real ones."""

    def test_gpu_tasks_have_their_share_and_cpu_tasks_see_no_gpu(self, cluster, box):
        config = RunConfig(workers=4, score=PoolConfig(num_gpus=0.5), idle_seconds=1)
        run(box, [box.stage(0), box.stage(1, seconds=0.2)], 10, config)
        opened = box.notes("opened")
        seen = {note["stage"]: set() for note in opened}
        for note in opened:
            seen[note["stage"]].add(note["gpus"])
        assert seen == {"download": {""}, "score": {"0"}}
        assert most_at_once(box, "score") == 2  # two halves of the one GPU
        assert len({note["pid"] for note in opened if note["stage"] == "score"}) == 2

    def test_a_stage_whose_resources_nobody_has_gets_no_shard_elsewhere(self, cluster, box):
        config = TWO.model_copy(update={"score": PoolConfig(resources={"elsewhere": 1})})
        stop = threading.Event()

        def should_stop():
            downloads = [n for n in box.notes("made") if n["stage"] == "download"]
            if len(downloads) == 3:
                stop.set()
            return stop.is_set()

        run(box, [box.stage(0), box.stage(1)], 3, config, should_stop=should_stop)
        assert {note["stage"] for note in box.notes("began")} == {"download"}
        node = cluster.add_node(num_cpus=1, resources={"elsewhere": 1})
        try:
            run(box, [box.stage(0), box.stage(1)], 3, config)
        finally:
            cluster.remove_node(node, allow_graceful=True)
        assert {n["node"] for n in box.notes("began") if n["stage"] == "score"} == {node.node_id}
        assert box.shards("captions") == [0, 1, 2]

    def test_one_place_for_all_stages_is_handed_down_the_chain(self, cluster, box):
        wide = PoolConfig(num_cpus=4)
        config = RunConfig(
            download=wide, score=PoolConfig(num_cpus=4), select=wide, idle_seconds=0.2
        )
        run(box, [box.stage(n) for n in range(3)], 3, config)
        assert box.shards("clean") == [0, 1, 2]


def most_at_once(box, stage):
    now = most = 0
    for note in box.notes():
        if note["stage"] == stage:
            now += {"began": 1, "made": -1}.get(note["what"], 0)
            most = max(most, now)
    return most


def test_a_dead_node_costs_the_shards_it_held_one_attempt(cluster, box):
    node = cluster.add_node(num_cpus=4, resources={"doomed": 4})
    config = RunConfig(workers=3, download=PoolConfig(resources={"doomed": 1}), idle_seconds=1)
    killed = threading.Event()

    def kill():
        while len(box.notes("made")) < 3:
            time.sleep(0.05)
        node.kill_raylet()
        killed.set()

    killer = threading.Thread(target=kill)
    replacement = []

    def should_stop():
        # On the main thread, where clusters may be changed.
        if killed.is_set() and not replacement:
            cluster.remove_node(node, allow_graceful=False)
            replacement.append(cluster.add_node(num_cpus=4, resources={"doomed": 4}))
        return False

    killer.start()
    try:
        # Long enough that workers notice before the shard in hand is done that their node is gone.
        watching = run(box, [box.stage(seconds=3)], 9, config, should_stop=should_stop)
    finally:
        killer.join()
        for each in replacement:
            cluster.remove_node(each, allow_graceful=True)
    assert watching.working[0].failures == {}
    assert box.shards() == list(range(9))
    assert max(attempts(box).values()) == 2
    assert sum(attempts(box).values()) <= 9 + 3


def test_a_node_that_announces_its_end_gets_no_more_shards_and_loses_none(cluster, box):
    node = cluster.add_node(num_cpus=4, resources={"spot": 4})
    spare = cluster.add_node(num_cpus=4, resources={"spot": 4})
    config = RunConfig(workers=2, download=PoolConfig(resources={"spot": 1}), idle_seconds=1)
    announced = []

    def should_stop():
        if not announced and len(box.notes("made")) >= 3:
            client = ray._private.worker.global_worker.gcs_client
            client.drain_node(node.node_id, 2, "spot node is taken back", 0)
            announced.append(time.time())
        return False

    try:
        run(box, [box.stage(seconds=0.3)], 30, config, should_stop=should_stop)
    finally:
        for each in (node, spare):
            cluster.remove_node(each, allow_graceful=True)
    assert attempts(box) == dict.fromkeys(range(30), 1)
    last = max([n["at"] for n in box.notes("began") if n["node"] == node.node_id], default=0.0)
    assert last < announced[0] + 10  # the driver looks every other second


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_both_engines_end_alike(cluster, box, engine):
    work = on_ray(TWO) if engine == "ray" else work_in_process
    watching = box.run([box.stage(0, does={1: ["bad"] * 9}), box.stage(1)], 4, TWO, work)
    assert box.shards("captions") == [0, 2, 3]
    status = watching.heart.status
    assert [(s.shards_done, s.shards_failed, s.rows_done) for s in status.stages] == [
        (3, 1, 3),
        (3, 0, 3),
    ]
    assert status.failures[0].error == "shard raw/web/00001: bad data"


def test_in_one_process_a_shard_goes_down_all_stages_before_the_next_begins(box):
    box.run([box.stage(n) for n in range(3)], 3, RunConfig(), work_in_process)
    order = [(note["index"], note["stage"]) for note in box.notes("made")]
    assert order == [(n, stage) for n in range(3) for stage in ("download", "score", "select")]


def test_stopped_in_the_middle_of_a_shard_its_rows_do_not_count(box):
    watching = box.run([box.stage(does={1: ["stopped"]})], 3, RunConfig(), work_in_process)
    assert watching.is_stopped
    (stage,) = watching.heart.status.stages
    assert (stage.shards_done, stage.rows_done, stage.shards_in_flight) == (1, 1, 0)
