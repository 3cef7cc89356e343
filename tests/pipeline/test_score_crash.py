"""Killed at any moment, any number of times, scoring ends with the bytes of an undisturbed run.

The children run the real job, tiny models and threads and all; what is compared is the whole
corpus, file by file.
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

import pytest
import score_jobs as jobs

from pipeline.corpus import Corpus
from pipeline.verify import verify

NUM_SHARDS, NUM_ROWS = 3, 12


class Children:
    """Runs jobs in forked children of one warm process; kills them when told."""

    def __init__(self, folder):
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": f"{here}:{here.parents[1]}",
            "OMP_NUM_THREADS": "1",  # forked children have none of their parent's threads
        }
        self._parent = subprocess.Popen(
            [sys.executable, str(here / "score_jobs.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._parent.stdout.readline() == "ready\n"

    def run(self, root, batch_size, kill_after_seconds=None):
        """Score a corpus; return whether the child was killed, and how long it ran."""
        self._parent.stdin.write(f"{root} {batch_size}\n")
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
def children(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    children = Children(folder)
    yield children
    children.close()


@pytest.mark.parametrize("num_kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_scoring_ends_with_the_same_bytes(tmp_path, children, num_kills):
    raw, reference = tmp_path / "raw", tmp_path / "reference"
    corpus = Corpus(str(raw))
    corpus.write_run("a: run\n")
    for index in range(NUM_SHARDS):
        jobs.commit_raw(corpus, jobs.rows_of_shard(index, NUM_ROWS), index)
    shutil.copytree(raw, reference)
    _, seconds = children.run(reference, 8)
    wanted = jobs.tree(reference)
    assert sum(name.startswith("captions") for name in wanted) == 2 * NUM_SHARDS
    draw = random.Random(num_kills)
    num_killed = num_corpora = 0
    while num_killed < num_kills:
        root = tmp_path / f"disturbed-{num_corpora}"
        shutil.copytree(raw, root)
        while children.run(root, draw.choice([1, 3, 8]), draw.uniform(0, seconds))[0]:
            num_killed += 1
        num_corpora += 1
        assert num_corpora < 10 * num_kills, "no kill came in time"
        got = jobs.tree(root)
        assert [
            name for name in wanted.keys() | got.keys() if got.get(name) != wanted.get(name)
        ] == []
        assert list(verify(Corpus(str(root)))) == []
        shutil.rmtree(root)
