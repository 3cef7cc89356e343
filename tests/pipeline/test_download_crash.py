"""Killed at any moment, any number of times, a download ends with the bytes of an undisturbed one.

The children run the real job, threads and all, against a real server that makes rows overtake each
other; what is compared is the whole corpus, file by file.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import download_jobs as jobs
import pytest
from scripted_server import ScriptedServer

from pipeline.corpus import Corpus
from pipeline.verify import verify

NUM_KILLS = 50
NUM_RETRY_KILLS = 15
MAX_RUNS = 10 * NUM_KILLS


class Children:
    """Runs jobs in forked children of one warm process; kills them when told."""

    def __init__(self):
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
        self._parent = subprocess.Popen(
            [sys.executable, str(here / "download_jobs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, what, root, port, kill_after_seconds=None):
        """Run a job; return whether it was killed, and how long it ran."""
        self._parent.stdin.write(f"{what} {root} {port}\n")
        self._parent.stdin.flush()
        child = int(self._parent.stdout.readline())
        started_at = time.monotonic()
        timer = None
        if kill_after_seconds is not None:
            timer = threading.Timer(kill_after_seconds, self._kill, (child,))
            timer.start()
        status = int(self._parent.stdout.readline())
        if timer is not None:
            timer.cancel()
        seconds = time.monotonic() - started_at
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True, seconds
        assert os.waitstatus_to_exitcode(status) == 0
        return False, seconds

    @staticmethod
    def _kill(child):
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(child, signal.SIGKILL)

    def close(self):
        self._parent.stdin.close()
        self._parent.wait(timeout=30)
        self._parent.stdout.close()


@pytest.fixture
def children():
    children = Children()
    yield children
    children.close()


@pytest.fixture
def web():
    """A web whose answers a test may change."""
    with ScriptedServer(lambda request: server.answer(request)) as server:
        server.answer = jobs.slow_and_sick
        yield server


def assert_same_as(reference, root):
    wanted, got = jobs.tree(reference), jobs.tree(root)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name] != wanted[name]] == []
    assert list(verify(Corpus(str(root)))) == []


def kill_until_done(children, what, root, port, moments):
    """Run a job, killing it after each of `moments` in turn until one comes too late."""
    num_kills = 0
    while children.run(what, root, port, next(moments))[0]:
        num_kills += 1
    return num_kills


def test_killed_fifty_times_a_download_ends_with_the_same_bytes(tmp_path, children, web):
    _, seconds = children.run("download", tmp_path / "reference", web.port)
    rng = random.Random(20)
    moments = iter(lambda: rng.uniform(0, seconds), None)
    num_kills = num_corpora = 0
    while num_kills < NUM_KILLS:
        root = tmp_path / f"disturbed-{num_corpora}"
        num_kills += kill_until_done(children, "download", root, web.port, moments)
        num_corpora += 1
        assert num_corpora < MAX_RUNS
        assert_same_as(tmp_path / "reference", root)
        shutil.rmtree(root)


def test_killed_while_it_replaces_shards_a_retry_ends_with_the_same_bytes(tmp_path, children, web):
    before, reference = tmp_path / "before", tmp_path / "reference"
    children.run("download", before, web.port)
    shutil.copytree(before, reference)
    web.answer = jobs.slow_and_healed
    _, seconds = children.run("retry", reference, web.port)
    assert jobs.tree(reference) != jobs.tree(before)
    rng = random.Random(21)
    moments = iter(lambda: rng.uniform(0, seconds), None)
    num_kills = num_corpora = 0
    while num_kills < NUM_RETRY_KILLS:
        root = tmp_path / f"disturbed-{num_corpora}"
        shutil.copytree(before, root)
        num_kills += kill_until_done(children, "retry", root, web.port, moments)
        num_corpora += 1
        assert num_corpora < MAX_RUNS
        assert_same_as(reference, root)
