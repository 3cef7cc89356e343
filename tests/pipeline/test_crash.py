"""Whatever a writer dies of and when, only whole shards exist and the next run ends the same."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from corpora import FIRST, SECOND, SOURCE, Recipe, build, race, tree
from crash_worker import MAX_SHARDS

from pipeline.corpus import Corpus
from pipeline.layout import STAGES
from pipeline.store import hash_stream
from pipeline.verify import verify

NUM_KILLS = 100


class Died(BaseException):
    """What a process that dies does not catch."""


class FaultyFs:
    """A filesystem that fails at its n-th operation, before, after or halfway through it."""

    def __init__(self, fs, at, how, fault):
        self._fs = fs
        self._at = at
        self._how = how
        self._fault = fault
        self.num_operations = 0

    def __getattr__(self, name):
        attribute = getattr(self._fs, name)
        if not callable(attribute) or name in ("invalidate_cache", "unstrip_protocol"):
            return attribute

        def operation(*args, **options):
            self.num_operations += 1
            if self.num_operations < self._at:
                return attribute(*args, **options)
            if self.num_operations > self._at:
                if self._fault is Died:
                    raise Died  # the dead do nothing more, not even tidy up
                return attribute(*args, **options)
            if self._how == "after":
                attribute(*args, **options)
            elif self._how == "halfway":
                self._write_half(name, *args)
            raise self._fault(f"at {name}")

        return operation

    def _write_half(self, name, *args):
        if name == "pipe_file":
            path, data = args
            self._fs.pipe_file(path, data[: len(data) // 2])
        elif name == "put_file":
            source, path = args
            data = Path(source).read_bytes()
            self._fs.pipe_file(path, data[: len(data) // 2])
        elif name == "cp_file":
            source, path = args
            data = self._fs.cat_file(source)
            self._fs.pipe_file(path, data[: len(data) // 2])


def faults_of(corpus):
    # A lone shard's missing run.yaml is not what these tests are about.
    return [fault for fault in verify(corpus) if fault.file != "run.yaml"]


def assert_only_whole_shards(corpus, can_halve_markers=False):
    for stage in STAGES:
        for record in corpus.shards(stage):
            for suffix, file in record.files.items():
                with corpus.open(record, suffix) as stream:
                    assert hash_stream(stream) == file.sha256
        for source in corpus.sources(stage):
            # A store whose puts are not atomic can leave half a marker: it counts as absent.
            assert can_halve_markers or not corpus.scan(stage, source).damaged


def disturb(root, how, fault, attempt, options):
    """Run an attempt on fresh corpora with a fault at operation 1, 2, ... until none is left."""
    at = 0
    while True:
        at += 1
        corpus = Corpus(root(at), options)
        before = attempt.prepare(corpus)
        real, faulty = corpus.store.fs, FaultyFs(corpus.store.fs, at, how, fault)
        corpus.store.fs = faulty
        with contextlib.suppress(fault):
            attempt.run(corpus, before)
        corpus.store.fs = real
        yield corpus
        if faulty.num_operations < at:
            return


class FirstCommit:
    def prepare(self, corpus):
        return None

    def run(self, corpus, before):
        Recipe(SECOND).commit(corpus)

    def finish(self, corpus):
        corpus.sweep()
        found = corpus.record("raw", SOURCE, 0)
        if found is None or found.fingerprint != SECOND:
            Recipe(SECOND).commit(corpus, replace=found)


class Replacement(FirstCommit):
    def prepare(self, corpus):
        return Recipe(FIRST).commit(corpus)

    def run(self, corpus, before):
        Recipe(SECOND).commit(corpus, replace=before)


class Sweep(Replacement):
    """A sweep of what a replacement leaves that dies just after its commit, and of older debris."""

    def prepare(self, corpus):
        before = super().prepare(corpus)
        Recipe("debris").commit(corpus, index=1)
        corpus.store.remove(f"raw/{SOURCE}/00001.json")
        real, moves = corpus.store.fs, []
        corpus.store.fs = Stopped(real, moves)
        with pytest.raises(Died):
            Recipe(SECOND).commit(corpus, replace=before)
        corpus.store.fs = real
        return before

    def run(self, corpus, before):
        corpus.sweep()


class Stopped:
    """A filesystem that dies when a committed file is to be given its final name."""

    def __init__(self, fs, moves):
        self._fs = fs

    def __getattr__(self, name):
        return getattr(self._fs, name)

    def mv(self, source, target):
        if target.endswith((".tar", ".parquet")):
            raise Died
        self._fs.mv(source, target)

    def cp_file(self, source, target):
        raise Died


@pytest.fixture(params=["local", "memory"])
def roots(request, tmp_path):
    if request.param == "local":
        return lambda at: str(tmp_path / str(at))
    return lambda at: f"memory://{tmp_path.name}/{at}"


@pytest.mark.parametrize("fault", [Died, OSError], ids=["dies", "fails"])
@pytest.mark.parametrize("how", ["before", "after", "halfway"])
@pytest.mark.parametrize(
    "attempt", [FirstCommit(), Replacement(), Sweep()], ids=lambda a: type(a).__name__
)
def test_a_fault_at_any_operation_leaves_whole_shards_and_the_next_attempt_the_same_bytes(
    roots, attempt, how, fault
):
    undisturbed = Corpus(roots("undisturbed"))
    Recipe(SECOND).commit(undisturbed)
    expected = tree(undisturbed)
    num_faults = 0
    for corpus in disturb(roots, how, fault, attempt, None):
        num_faults += 1
        assert_only_whole_shards(corpus, how == "halfway" and not corpus.store.is_local)
        found = corpus.record("raw", SOURCE, 0)
        if found is not None and type(attempt) is not FirstCommit:
            assert found.fingerprint in (FIRST, SECOND)
        attempt.finish(corpus)
        corpus.sweep()
        assert tree(corpus) == expected
        assert faults_of(corpus) == []
    assert num_faults > 5


def test_an_attempt_with_other_bytes_after_a_crash_leaves_one_of_the_two(roots):
    expected = []
    for content in (FIRST, SECOND):
        corpus = Corpus(roots(content))
        Recipe(content).commit(corpus)
        expected.append(tree(corpus))
    seen = set()
    for corpus in disturb(roots, "after", Died, FirstCommit(), None):
        Recipe(FIRST).commit(corpus)
        corpus.sweep()
        seen.add(expected.index(tree(corpus)))
        assert faults_of(corpus) == []
    assert seen == {0, 1}


class Worker:
    """The crash worker and what it is asked to do."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("crash_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, root, num_shards, *, at=0, kill_after=None):
        """Return whether the job came to its end."""
        self._process.stdin.write(f"{root} {num_shards} {at}\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)  # the moment of death is the point of the test
            # Not reaped before its parent says so, hence never another process.
            os.kill(child, signal.SIGKILL) if self._runs(child) else None
        status = int(self._process.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status == 0

    @staticmethod
    def _runs(child):
        return Path(f"/proc/{child}").exists()

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_a_kill_at_every_file_operation_of_a_run_leaves_no_trace(worker, tmp_path):
    undisturbed = Corpus(str(tmp_path / "undisturbed"))
    build(undisturbed, 1)
    expected = tree(undisturbed)
    at, is_done = 0, False
    while not is_done:
        at += 1
        root = tmp_path / f"{at}"
        is_done = worker.run(root, 1, at=at)
        assert_only_whole_shards(Corpus(str(root)))
        assert worker.run(root, 1)
        assert tree(Corpus(str(root))) == expected
    assert at > 100


def test_kills_at_random_times_leave_no_trace(worker, tmp_path):
    undisturbed = Corpus(str(tmp_path / "undisturbed"))
    begin = time.perf_counter()
    assert worker.run(undisturbed.root, MAX_SHARDS)
    duration = time.perf_counter() - begin
    expected = tree(undisturbed)
    assert list(verify(undisturbed)) == []
    draw = random.Random(0)
    num_kills = num_rounds = 0
    while num_kills < NUM_KILLS:
        corpus = Corpus(str(tmp_path / str(num_rounds)))
        num_rounds += 1
        while not worker.run(corpus.root, MAX_SHARDS, kill_after=draw.uniform(0, duration * 0.4)):
            num_kills += 1
            assert_only_whole_shards(corpus)
        assert worker.run(corpus.root, MAX_SHARDS)
        assert tree(corpus) == expected
        assert list(verify(corpus)) == []
    assert num_rounds < NUM_KILLS


def assert_one_won(corpus, num_rounds, winners):
    assert len(set(winners)) == 2 * num_rounds  # every round had one winner, known to all
    assert faults_of(corpus) == []
    assert len(tree(corpus)) == 3 * num_rounds


def test_of_racing_threads_one_wins_whole(tmp_path):
    num_racers, num_rounds = 8, 10
    barrier, results = threading.Barrier(num_racers), Results()
    with ThreadPoolExecutor(num_racers) as pool:
        done = [
            pool.submit(race, str(tmp_path), number, num_rounds, barrier, results)
            for number in range(num_racers)
        ]
    assert [future.result() for future in done] == [None] * num_racers
    assert_one_won(Corpus(str(tmp_path)), num_rounds, [w for won in results.all for w in won])


class Results:
    def __init__(self):
        self.all = []

    def put(self, result):
        self.all.append(result)


def test_of_racing_processes_one_wins_whole(tmp_path):
    num_racers, num_rounds = 3, 20
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_racers, timeout=120), context.Queue()
    racers = [
        context.Process(target=race, args=(str(tmp_path), number, num_rounds, barrier, results))
        for number in range(num_racers)
    ]
    for racer in racers:
        racer.start()
    won = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert won[0] == won[1] == won[2]
    assert_one_won(Corpus(str(tmp_path)), num_rounds, won[0])


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_sweep_during_commits_costs_attempts_but_no_shard(kind, tmp_path):
    root = str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}"
    is_over = threading.Event()

    def sweep():
        corpus = Corpus(root)
        while not is_over.is_set():
            corpus.sweep()

    recipe, corpus, num_lost = Recipe(), Corpus(root), 0
    recipe.commit(corpus, index=0)
    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for index in range(1, 30):
            while corpus.record("raw", SOURCE, index) is None:
                try:
                    recipe.commit(corpus, index=index)
                except FileNotFoundError:
                    num_lost += 1
                    assert num_lost < 3000
    finally:
        is_over.set()
        sweeper.join()
    corpus.sweep()
    assert faults_of(corpus) == []
    assert len(corpus.shards("raw")) == 30
