"""Workers, nodes, drivers and heads killed on a real Ray cluster; the bytes are one worker's own.

`-m slow` runs the same scenarios with many more seeds.
"""

import os
import random
import signal
import threading
import time

import chaos_jobs as chaos
import pytest
from ray_box import ray_cluster

from jobs.recipe import load_recipe
from jobs.run import run
from pipeline.corpus import Corpus

MAX_RUNS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return chaos.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    children = chaos.Children(tmp_path_factory.mktemp("children"))
    yield children
    children.close()


@pytest.fixture(scope="module")
def expected(world, children, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    assert children.run(chaos.command(world, root)) == 0, children.output
    return chaos.tree(Corpus(str(root)).store)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(num_cpus=8) as started:
        yield started


def workers_of(cluster):
    """The processes of this cluster's actors; others may run Ray on this machine too."""
    (raylet,) = cluster.head_node.all_processes["raylet"]
    return [
        pid
        for pid, (parent, _, command) in chaos.processes().items()
        if parent == raylet.process.pid and command.startswith("ray::ShardWorker")
    ]


def run_here(world, root, num_workers=2):
    """Run on the cluster that this process is connected to."""
    sets = [f"root={root}", f"run.workers={num_workers}", "run.engine=ray"]
    return run(load_recipe(str(world), sets), lambda: False)


def finish(world, root, expected):
    for _ in range(MAX_RUNS):
        summary = run_here(world, root)
        assert summary.bugs == {}
        if summary.exit_code == 0:
            chaos.check_whole(root, expected)
            return
        chaos.check_status(root, {"some shards failed"})
    pytest.fail(f"not done after {MAX_RUNS} runs")


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_number_of_workers_ends_in_the_same_bytes(
    cluster, world, expected, tmp_path, num_workers
):
    assert run_here(world, tmp_path, num_workers).exit_code == 0
    chaos.check_whole(tmp_path, expected)


def kill_workers(cluster, world, root, expected, seed):
    rng, ended, killed = random.Random(seed), threading.Event(), []

    def kill_some():
        for _ in range(rng.randrange(1, 4)):
            aim = chaos.num_committed(root) + rng.randrange(0, 6)
            while chaos.num_committed(root) < aim or not workers_of(cluster):
                if ended.wait(0.01):
                    return
            victim = rng.choice(workers_of(cluster) or [0])
            if victim:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        summary = run_here(world, root)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert summary.exit_code in (0, 1)
    finish(world, root, expected)


@pytest.mark.parametrize("seed", range(6))
def test_workers_are_killed(cluster, world, expected, tmp_path, seed):
    kill_workers(cluster, world, tmp_path, expected, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_workers_are_killed_many_more_times(cluster, world, expected, tmp_path, seed):
    kill_workers(cluster, world, tmp_path, expected, seed)


@pytest.mark.parametrize("seed", range(2))
def test_a_node_is_killed(cluster, world, expected, tmp_path, seed):
    rng, ended, killed = random.Random(seed), threading.Event(), threading.Event()
    node = cluster.add_node(num_cpus=4)
    aim = rng.randrange(1, 10)

    def kill():
        while chaos.num_committed(tmp_path) < aim:
            if ended.wait(0.01):
                return
        node.kill_raylet()
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run_here(world, tmp_path)
    finally:
        ended.set()
        killer.join()
        cluster.remove_node(node, allow_graceful=False)
    assert killed.is_set()
    assert summary.exit_code in (0, 1)
    finish(world, tmp_path, expected)


@pytest.mark.parametrize("seed", range(2))
def test_the_driver_of_a_cluster_is_killed(cluster, world, children, expected, tmp_path, seed):
    rng, ended = random.Random(seed), threading.Event()
    aim = rng.randrange(1, 12)
    arguments = chaos.command(world, tmp_path, "run.workers=2")
    pid = children.start([*arguments, f"--address={cluster.address}"])
    killer = chaos.kill_once(lambda: chaos.num_committed(tmp_path) >= aim, lambda: [pid], ended)
    code = children.wait()
    ended.set()
    killer.join()
    assert code == -signal.SIGKILL, children.output
    chaos.check_status(tmp_path, {"died"})
    finish(world, tmp_path, expected)


@pytest.mark.parametrize("seed", range(2))
def test_a_head_is_lost_with_its_driver_and_the_next_one_goes_on(
    world, children, expected, tmp_path, seed
):
    """The run's own Ray: its head, its raylet, its workers and its driver die at once."""
    rng, ended = random.Random(seed), threading.Event()
    aim = rng.randrange(1, 12)
    arguments = chaos.command(world, tmp_path, "run.workers=2", "run.select.max_actors=1")
    pid = children.start(arguments)
    everything = []

    def all_of_it():
        everything.extend(sorted(chaos.descendants(pid) | {pid}))
        return everything

    killer = chaos.kill_once(lambda: chaos.num_committed(tmp_path) >= aim, all_of_it, ended)
    code = children.wait()
    ended.set()
    killer.join()
    assert code == -signal.SIGKILL, children.output
    assert len(everything) > 5  # gcs, raylet, its agents, workers
    chaos.check_status(tmp_path, {"died"})
    wait_until_gone(everything)
    assert children.run(arguments) == 0, children.output
    chaos.check_whole(tmp_path, expected)


def commands_of(pids):
    table = chaos.processes()
    return [table[pid][2] for pid in pids if pid in table]


def wait_until_gone(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while any("ray" in command for command in commands_of(pids)):
        assert time.monotonic() < deadline, commands_of(pids)
        time.sleep(0.05)
