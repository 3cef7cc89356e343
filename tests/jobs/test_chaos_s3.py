"""When S3 answers 500 and 503 for a while, or hangs up, a run waits or ends, and then goes on."""

import random

import chaos_jobs as chaos
import pytest
from faulty_s3 import BUCKET, FaultyS3

from jobs.durable import count_shards, read_status
from pipeline.corpus import Corpus
from pipeline.verify import verify

MAX_RUNS = 10


@pytest.fixture(scope="module")
def s3():
    server = FaultyS3()
    yield server
    server.close()


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
    """The files of an undisturbed run on a local disk: where a corpus lies leaves no trace."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert children.run(chaos.command(world, root)) == 0, children.output
    return chaos.tree(Corpus(str(root)).store)


def disturbed_run(s3, children, world, expected, seed):
    rng = random.Random(seed)
    root = f"s3://{BUCKET}/{seed}"
    arguments = chaos.command(world, root, "run.heartbeat_seconds=1")
    codes = []
    for _ in range(MAX_RUNS):
        s3.fail(after=rng.randrange(5, 150), requests=rng.randrange(10, 80), seed=rng.random())
        codes.append(children.run(arguments, environment=s3.environment))
        assert codes[-1] in (0, 1), children.output
        assert "Traceback" not in children.output
        s3.heal()
        if not codes[-1]:
            break
    options = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": s3.url}}
    corpus = Corpus(root, options)
    assert chaos.tree(corpus.store) == expected, codes
    assert list(verify(corpus)) == []
    status = read_status(corpus)
    assert (status.condition, status.driver.is_known_dead) == ("done", True)
    assert {s.folder: s.shards_done for s in status.stages} == {
        folder: sum(count_shards(corpus, folder).values()) for folder in chaos.FOLDERS
    }


@pytest.mark.parametrize("seed", [1])
def test_s3_fails_for_a_while(s3, children, world, expected, seed):
    disturbed_run(s3, children, world, expected, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_s3_fails_many_more_times(s3, children, world, expected, seed):
    disturbed_run(s3, children, world, expected, seed)
