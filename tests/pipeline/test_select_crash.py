"""However often selecting is killed, the next run ends in the bytes of one that was not."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import select_worker
from corpora import tree
from select_corpora import SOURCE, commit, raw_row, synthetic, web

from pipeline.corpus import Corpus
from pipeline.verify import verify

NUM_SHARDS = 6
WORKER = Path(__file__).with_name("select_worker.py")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A corpus with everything but its clean stage."""
    corpus = Corpus(str(tmp_path_factory.mktemp("upstream")))
    corpus.write_run("a: run\n")
    draw = random.Random(0)
    for index in range(NUM_SHARDS):
        images = []
        for number in range(100):
            key = f"{index * 100 + number:09d}"
            if draw.random() < 0.2:
                images.append((raw_row(key, verdict="failed", reason="not_found"), []))
                continue
            captions = [web(f"web {key}", itm=draw.random())]
            captions += [synthetic(f"made {n}", n, itm=draw.random()) for n in range(3)]
            images.append((raw_row(key), captions))
        commit(corpus, images, index=index)
    return corpus


@pytest.fixture(scope="module")
def expected(upstream, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed") / "corpus"
    shutil.copytree(upstream.root, root)
    select_worker.run(str(root))
    return tree(Corpus(str(root)))


def run(root, kill_after):
    """Run the worker; kill it some seconds after it has begun. Return whether it came to its end.

    Its imports are over by then, so the moment falls into the work.
    """
    process = subprocess.Popen([sys.executable, WORKER, root], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(kill_after)  # the moment of death is the point of the test
    process.kill()
    status = process.wait()
    process.stdout.close()
    assert status in (0, -9)
    return status == 0


def kill_often(upstream, expected, tmp_path, num_kills):
    begin = time.perf_counter()
    shutil.copytree(upstream.root, tmp_path / "timed")
    select_worker.run(str(tmp_path / "timed"))
    duration = time.perf_counter() - begin
    draw, done, rounds = random.Random(1), 0, 0
    while done < num_kills:
        corpus = Corpus(str(tmp_path / f"{rounds}"))
        shutil.copytree(upstream.root, corpus.root)
        rounds += 1
        for _ in range(5):
            is_over = run(corpus.root, draw.uniform(0, duration / 3))
            done += not is_over
            for record in corpus.shards("clean", SOURCE):
                assert record.counts.total == 100
            if is_over or done >= num_kills:
                break
        select_worker.run(corpus.root)
        assert tree(corpus) == expected
        assert list(verify(corpus)) == []


def test_eight_kills_leave_no_trace(upstream, expected, tmp_path):
    kill_often(upstream, expected, tmp_path, 8)


@pytest.mark.slow
def test_fifty_kills_leave_no_trace(upstream, expected, tmp_path):
    kill_often(upstream, expected, tmp_path, 50)
