"""Training that goes on with fewer workers: what is asked of Ray, and a node that dies."""

import math
import threading
import time

import pytest
from ray_box import ray_cluster
from training_jobs import CPU, alone, job, records, write_corpus

from jobs.checkpoint import Checkpoints
from jobs.errors import UserError
from jobs.training.config import WorkersConfig
from jobs.training.context import TrainContext
from jobs.training.data import check_workers, cut
from jobs.training.exports import read_card
from jobs.training.logs import read_metrics
from jobs.training.ray_train import scaling, train_on_ray

NUM_STEPS = 60


def test_ray_is_told_the_fewest_and_the_most_workers():
    asked = scaling(WorkersConfig(num_workers=4, min_workers=2, cpus_per_worker=3), uses_gpu=False)
    assert (asked.elasticity_enabled, asked.min_workers, asked.max_workers) == (True, 2, 4)
    assert asked.resources_per_worker == {"CPU": 3}
    fixed = scaling(WorkersConfig(num_workers=4), uses_gpu=True)
    assert (fixed.elasticity_enabled, fixed.num_workers) == (False, 4)


def test_a_group_that_may_shrink_cuts_the_same_micro_batches_at_every_size(tmp_path):
    this = job(tmp_path, "med", workers={"num_workers": 4, "min_workers": 1})
    firsts = {}
    for world_size in (1, 2, 4):
        pieces = [cut(this, 24, TrainContext(CPU, rank, world_size)) for rank in range(world_size)]
        assert {each.size for each in pieces} == {math.gcd(24, 12, 8, 6)}
        firsts[world_size] = [each.first + n for each in pieces for n in range(each.count)]
    assert firsts[1] == firsts[2] == firsts[4] == list(range(12))


def test_a_group_that_keeps_its_size_takes_its_share_in_one_piece(tmp_path):
    this = job(tmp_path, "med", workers={"num_workers": 2})
    assert cut(this, 8, TrainContext(CPU, 1, 2)).size == 4


def test_a_number_of_workers_that_cannot_share_the_batch_is_refused_before_it_is_needed(tmp_path):
    write_corpus(tmp_path)
    with pytest.raises(UserError, match="cannot be shared equally by 3 workers"):
        check_workers(job(tmp_path, "med", workers={"num_workers": 4, "min_workers": 2}))


def kill_when_trained(cluster, node, this, seen):
    """Kill a node, as a power cut would, once training has left a checkpoint to go on from."""
    checkpoints = Checkpoints(this.open_store(), f"{this.folder}/checkpoints")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        last = checkpoints.latest()
        if last is not None and last.step >= 4:
            seen["killed_at"] = last.step
            cluster.remove_node(node, allow_graceful=False)
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_when_a_node_dies_training_goes_on_with_those_who_are_left(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    steady, shrunk = (
        job(
            tmp_path / name,
            "med",
            {"num_steps": NUM_STEPS},
            workers={"num_workers": 2, "min_workers": 1},
        )
        for name in ("steady", "shrunk")
    )
    for this in (steady, shrunk):
        write_corpus(this.root)
    alone(steady)
    seen = {}
    with ray_cluster(num_cpus=1) as cluster:
        other = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        killer = threading.Thread(
            target=kill_when_trained, args=(cluster, other, shrunk, seen), daemon=True
        )
        killer.start()
        train_on_ray(shrunk)
        killer.join()
    assert seen["killed_at"] < NUM_STEPS
    assert read_card(shrunk.open_store(), "med").step == NUM_STEPS
    rows = read_metrics(shrunk.open_store(), shrunk.folder)
    sizes = [row["pace"]["num_workers"] for row in rows]
    assert (sizes[0], sizes[-1]) == (2, 1)
    assert sizes == sorted(sizes, reverse=True)
    ours, theirs = records(shrunk), records(steady)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        names = {name for name, value in other.items() if isinstance(value, float)}
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, abs=1e-5)
