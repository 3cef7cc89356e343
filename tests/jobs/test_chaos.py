"""Killed anywhere, any number of times, the same command again ends in an undisturbed run's bytes.

Real processes, real signals, the real command line and all three stages. After every disturbance
the status is what a person would want it to be, and at the end the corpus is compared byte by byte.
`-m slow` runs the same scenarios with many more seeds.
"""

import os
import random
import signal
import threading
import time
from datetime import UTC, datetime

import chaos_jobs as chaos
import pytest

from jobs.durable import Condition, count_shards
from jobs.status import read_status
from pipeline.corpus import Corpus

MAX_RUNS = 30


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
    """The files of a run that nobody disturbed, by one worker."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert children.run(chaos.command(world, root)) == 0, children.output
    corpus = Corpus(str(root))
    files = chaos.tree(corpus.store)
    assert len(files) == chaos.NUM_SHARDS * (3 + 2 + 3)
    return files


def finish(children, arguments, root, expected, **options):
    """Give the same command until it is done, as a person would."""
    for _ in range(MAX_RUNS):
        code = children.run(arguments, **options)
        if code == 0:
            return chaos.check_whole(root, expected)
        assert code == 1, children.output
    pytest.fail(f"not done after {MAX_RUNS} runs: {children.output}")


def disturb_driver(children, arguments, root, seed):
    """Kill the driver once a random number of further shards is there; say whether it was."""
    rng = random.Random(seed)
    aim = chaos.num_committed(root) + rng.randrange(0, 8)
    delay, ended = rng.random() * 0.03, threading.Event()
    pid = children.start(arguments)
    killer = chaos.kill_once(
        lambda: chaos.num_committed(root) >= aim and not time.sleep(delay), lambda: [pid], ended
    )
    code = children.wait()
    ended.set()
    killer.join()
    assert code in (0, -signal.SIGKILL), children.output
    return code != 0


def kill_driver_often(children, world, root, expected, seed):
    arguments, rng = chaos.command(world, root), random.Random(seed)
    num_killed = 0
    for _ in range(rng.randrange(2, 5)):
        if disturb_driver(children, arguments, root, rng.random()):
            num_killed += 1
            if chaos.num_committed(root) or (root / "run" / "status.json").exists():
                chaos.check_status(root, {"died"})
    assert num_killed
    finish(children, arguments, root, expected)


@pytest.mark.parametrize("seed", range(10))
def test_the_driver_is_killed(children, world, expected, tmp_path, seed):
    kill_driver_often(children, world, tmp_path, expected, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_the_driver_is_killed_many_more_times(children, world, expected, tmp_path, seed):
    kill_driver_often(children, world, tmp_path, expected, seed)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_asked_to_stop(children, world, expected, tmp_path, seed):
    arguments, rng = chaos.command(world, tmp_path), random.Random(seed)
    aim, ended = rng.randrange(1, chaos.NUM_MARKERS - 8), threading.Event()
    pid = children.start(arguments)

    def stop():
        while chaos.num_committed(tmp_path) < aim and not ended.wait(0.002):
            pass
        if not ended.is_set():
            os.kill(pid, rng.choice([signal.SIGTERM, signal.SIGINT]))

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert children.wait() == 130, children.output
    ended.set()
    stopper.join()
    assert "to continue: capfilt run" in children.output
    status = chaos.check_status(tmp_path, {"stopped"})
    assert {stage.folder: stage.shards_done for stage in status.run.stages} == {
        folder: sum(count_shards(Corpus(str(tmp_path)), folder).values())
        for folder in chaos.FOLDERS
    }
    finish(children, arguments, tmp_path, expected)


@pytest.mark.parametrize("max_file_bytes", [200, 900, 2500, 6000])
def test_the_disk_is_full(children, world, expected, tmp_path, max_file_bytes):
    """No file may grow beyond a size, which writers meet as they meet a full disk."""
    arguments = chaos.command(world, tmp_path)
    assert children.run(arguments, max_file_bytes=max_file_bytes) == 1, children.output
    assert "Traceback" not in children.output
    assert "what is committed is safe, the same command continues" in children.output
    if (tmp_path / "run" / "status.json").exists():
        chaos.check_status(tmp_path, {"broken off", "died"})
    finish(children, arguments, tmp_path, expected)


def test_a_second_driver_is_refused_while_the_first_goes_on(children, world, expected, tmp_path):
    other = chaos.Children(tmp_path)
    root = tmp_path / "corpus"
    try:
        assert other.run(["schema"]) == 0  # it is warm now
        first = children.start(chaos.command(world, root))
        while not chaos.num_committed(root):
            time.sleep(0.001)
        os.kill(first, signal.SIGSTOP)  # so that it is sure to be there still
        code, output = other.run(chaos.command(world, root)), other.output
        chaos.check_status(root, {"running"})
        os.kill(first, signal.SIGCONT)
        assert children.wait() == 0
    finally:
        other.close()
    assert code == 2, output
    assert f"{root} is being run by " in output
    assert "Traceback" not in output
    chaos.check_whole(root, expected)


def test_a_lost_status_file_costs_nothing(children, world, expected, tmp_path):
    arguments = chaos.command(world, tmp_path)
    while not disturb_driver(children, arguments, tmp_path, seed=7):
        pytest.fail("the driver was to be killed")
    (tmp_path / "run" / "status.json").unlink()
    finish(children, arguments, tmp_path, expected)
    assert read_status(str(tmp_path), datetime.now(UTC)).run.condition is Condition.DONE
