"""The contract of a corpus holds on any store: a local disk, memory, and S3's protocol by HTTP."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from corpora import FIRST, SECOND, SOURCE, Recipe, build, tree
from moto.server import ThreadedMotoServer
from test_crash import (
    Died,
    FaultyFs,
    FirstCommit,
    Replacement,
    assert_only_whole_shards,
    disturb,
    faults_of,
)

from pipeline.corpus import Corpus
from pipeline.sample import ShardError
from pipeline.verify import verify

BUCKET = "corpora"


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"key": "test", "secret": "test"}
    client = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
    boto3.client(
        "s3", aws_access_key_id="test", aws_secret_access_key="test", **client
    ).create_bucket(Bucket=BUCKET)
    yield {**keys, "client_kwargs": client}
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """A root of its own on each kind of store, and what is needed to get there."""
    if request.param == "s3":
        return f"s3://{BUCKET}/{uuid.uuid4().hex}", request.getfixturevalue("s3")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}", None
    return str(tmp_path / "corpus"), None


@pytest.fixture
def corpus(place):
    return Corpus(*place)


def test_a_whole_run_ends_whole_and_the_same_as_on_a_local_disk(corpus, tmp_path):
    build(corpus, 2)
    local = Corpus(str(tmp_path / "local"))
    build(local, 2)
    assert tree(corpus) == tree(local)
    assert list(verify(corpus)) == []
    build(corpus, 2)
    assert tree(corpus) == tree(local)


def test_the_root_is_an_url_that_leads_back_to_the_corpus(corpus, place):
    record = Recipe().commit(corpus)
    assert Corpus(corpus.root, place[1]).shards("raw") == [record]


def test_what_another_client_commits_is_seen_at_once(corpus, place):
    assert corpus.shards("raw") == []
    other = Corpus(*place)
    first = Recipe(FIRST).commit(other)
    assert corpus.shards("raw") == [first]
    second = Recipe(SECOND).commit(other, replace=first)
    assert corpus.record("raw", SOURCE, 0) == second
    with corpus.open(second, "tar") as stream:
        assert stream.read() == Recipe(SECOND).files("raw", 0)["tar"]


def test_a_file_can_be_read_from_the_middle_and_copied(corpus, tmp_path):
    record = Recipe().commit(corpus)
    data = Recipe().files("raw", 0)["tar"]
    with corpus.open(record, "tar") as stream:
        stream.seek(512)
        assert stream.read(9) == data[512:521]
    copy = corpus.local_copy(record, "tar", str(tmp_path))
    assert Path(copy).read_bytes() == data
    assert (corpus.local_path(record, "tar") is None) == (not corpus.store.is_local)


def test_the_first_marker_wins(corpus):
    first = Recipe(FIRST).commit(corpus)
    before = tree(corpus)
    assert Recipe(SECOND).commit(corpus) == first
    assert tree(corpus) == before


def test_a_replacement_is_exact(corpus):
    first = Recipe(FIRST).commit(corpus)
    second = Recipe(SECOND).commit(corpus, replace=first)
    assert Recipe("third").commit(corpus, replace=first) == second
    assert len(tree(corpus)) == 3
    assert faults_of(corpus) == []


def test_a_swap_fails_if_the_file_changed_after_it_was_read(corpus, place):
    """The case that looking first cannot catch: the change comes between looking and writing."""
    if place[0].startswith("memory"):
        pytest.skip("memory has no conditional writes, and no other process")
    corpus.store.make_folder("")
    assert corpus.store.create("x", b"1")
    assert not corpus.store.create("x", b"2")

    class LateChange(FaultyFs):
        def __getattr__(self, name):
            attribute = getattr(self._fs, name)

            def late(path, data, **options):
                other.fs.pipe_file(path, b"3")
                return attribute(path, data, **options)

            return late if name == "pipe_file" and not corpus.store.is_local else attribute

    other = Corpus(*place).store
    corpus.store.fs = LateChange(corpus.store.fs, 0, "", OSError)
    assert corpus.store.swap("x", b"1", b"2") == corpus.store.is_local
    assert other.read("x") == (b"2" if corpus.store.is_local else b"3")


def test_racing_commits_have_one_winner(place):
    if place[0].startswith("memory"):
        pytest.skip("memory creates files in two steps; nobody else can reach it")
    num_racers = 6
    recipes = [Recipe(f"content {number}") for number in range(num_racers)]
    corpora = [Corpus(*place) for _ in recipes]
    barrier = threading.Barrier(num_racers)

    def race(recipe, corpus, index):
        recipe.files("raw", index)
        barrier.wait()
        return recipe.commit(corpus, index=index).sha256

    with ThreadPoolExecutor(num_racers) as pool:
        for index in range(5):
            won = set(pool.map(race, recipes, corpora, [index] * num_racers))
            assert won == {corpora[0].record("raw", SOURCE, index).sha256}
    assert faults_of(corpora[0]) == []
    assert len(tree(corpora[0])) == 15


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("attempt", [FirstCommit(), Replacement()], ids=lambda a: type(a).__name__)
def test_on_s3_a_death_at_any_request_leaves_whole_shards(s3, attempt, how):
    base = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    undisturbed = Corpus(f"{base}/undisturbed", s3)
    Recipe(SECOND).commit(undisturbed)
    expected = tree(undisturbed)
    for corpus in disturb(lambda at: f"{base}/{at}", how, Died, attempt, s3):
        assert_only_whole_shards(corpus)
        attempt.finish(corpus)
        corpus.sweep()
        assert tree(corpus) == expected


def test_a_missing_object_is_said_to_be_missing(corpus):
    record = Recipe().commit(corpus)
    corpus.store.remove(f"{record.name}.tar")
    with pytest.raises(ShardError, match="missing"):
        corpus.open(record, "tar")
    assert [fault.file for fault in faults_of(corpus)] == [f"{record.name}.tar"]


def test_a_marker_that_another_client_damaged_is_found(corpus):
    record = Recipe().commit(corpus)
    corpus.store.fs.pipe_file(corpus.store.full(f"{record.name}.json"), b"{}")
    assert corpus.shards("raw") == []
    (fault,) = faults_of(corpus)
    assert fault.file == f"{record.name}.json"


def test_the_runs_description_is_written_once(corpus):
    assert corpus.read_run() is None
    assert corpus.write_run("seed: 1") == "seed: 1\n"
    assert corpus.write_run("seed: 2") == "seed: 1\n"
