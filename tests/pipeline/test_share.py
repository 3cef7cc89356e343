"""Another root gets the same shards, without a copy where storage can, whole or not at all."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

import boto3
import pytest
from corpora import tree
from moto.server import ThreadedMotoServer
from select_corpora import SOURCE, commit, commit_raw, raw_row, synthetic, web
from test_crash import Died, FaultyFs

from pipeline.corpus import Corpus
from pipeline.sample import ShardError
from pipeline.select import Selector
from pipeline.selection.config import SelectConfig
from pipeline.share import Way, share_shard, share_upstream
from pipeline.verify import verify

IMAGES = [
    (raw_row(f"{n:09d}"), [web(f"web {n}", itm=n / 9), synthetic(f"made {n}", itm=1 - n / 9)])
    for n in range(10)
]
UPSTREAM = ("raw/web/00000.parquet", "raw/web/00000.tar", "captions/web/00000.parquet")


def corpus_at(root, **options):
    corpus = Corpus(str(root), options or None)
    corpus.write_run("a: run\n")
    return corpus


@pytest.fixture
def first(tmp_path):
    corpus = corpus_at(tmp_path / "first")
    commit(corpus, IMAGES)
    return corpus


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    boto3.client("s3", **keys, **client).create_bucket(Bucket="shared")
    yield {"key": "test", "secret": "test", "client_kwargs": client}
    server.stop()


def ways(files):
    return {file.way for file in files}


def upstream_of(corpus):
    return {path: data for path, data in tree(corpus).items() if path in UPSTREAM}


def test_on_one_disk_not_a_byte_is_copied(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    raw, scored, files = share_upstream(first, second, SOURCE, 0)
    assert ways(files) == {Way.LINKED}
    assert sorted(file.name for file in files) == sorted(UPSTREAM)
    for path in UPSTREAM:
        ours, theirs = (os.stat(Path(c.root) / path) for c in (first, second))
        assert (ours.st_ino, ours.st_dev) == (theirs.st_ino, theirs.st_dev)
    assert raw == first.record("raw", SOURCE, 0) == second.record("raw", SOURCE, 0)
    assert scored == second.record("captions", SOURCE, 0)
    assert list(verify(second)) == []


def test_selecting_again_elsewhere_needs_no_model_and_leaves_the_first_as_it_was(first, tmp_path):
    Selector(first, SelectConfig()).select(*first.shards("raw"), *first.shards("captions"))
    before = tree(first)
    program = f"""
import sys
from pipeline.corpus import Corpus
from pipeline.select import Selector
from pipeline.selection.config import SelectConfig
from pipeline.share import share_upstream
first, second = Corpus({first.root!r}), Corpus({str(tmp_path / "second")!r})
raw, scored, files = share_upstream(first, second, {SOURCE!r}, 0)
Selector(second, SelectConfig(itm_threshold=0.8)).select(raw, scored)
print({{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
    assert tree(first) == before
    kept = [
        c.record("clean", SOURCE, 0).stats["captions"]["kept"]
        for c in (first, Corpus(str(tmp_path / "second")))
    ]
    assert sum(kept[1].values()) < sum(kept[0].values())


def test_replacing_a_shard_in_one_root_leaves_the_other_as_it_was(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    raw, _, _ = share_upstream(first, second, SOURCE, 0)
    before = tree(first)
    commit_raw(second, [row for row, _ in IMAGES[:5]], replace=raw)
    assert tree(first) == before


def test_sharing_again_finds_everything_there(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    share_upstream(first, second, SOURCE, 0)
    before = tree(second)
    assert ways(share_upstream(first, second, SOURCE, 0)[2]) == {Way.PRESENT}
    assert tree(second) == before


def test_a_marker_that_was_deleted_is_put_back(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    share_upstream(first, second, SOURCE, 0)
    before = tree(second)
    second.store.remove(f"raw/{SOURCE}/00000.json")
    assert ways(share_shard(first, second, "raw", SOURCE, 0)[1]) == {Way.LINKED}
    assert tree(second) == before
    assert list(verify(second)) == []


@pytest.fixture
def another_disk(tmp_path):
    disk = Path("/dev/shm")
    if not os.access(disk, os.W_OK) or disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm as a second disk")
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        yield Path(folder)


def test_another_disk_gets_a_copy(first, another_disk):
    second = corpus_at(another_disk / "second")
    assert ways(share_upstream(first, second, SOURCE, 0)[2]) == {Way.STREAMED}
    assert upstream_of(second) == upstream_of(first)
    assert list(verify(second)) == []


def test_an_object_store_copies_by_itself(s3):
    first, second = (corpus_at(f"s3://shared/{uuid.uuid4().hex}", **s3) for _ in range(2))
    commit(first, IMAGES)
    assert ways(share_upstream(first, second, SOURCE, 0)[2]) == {Way.COPIED}
    assert upstream_of(second) == upstream_of(first)
    assert list(verify(second)) == []
    done = Selector(second, SelectConfig()).select(
        *second.shards("raw"), *second.shards("captions")
    )
    assert done.record.counts.total == 10
    assert list(verify(second)) == []


def test_between_kinds_of_storage_it_is_streamed(first, tmp_path):
    afar = corpus_at(f"memory://{uuid.uuid4().hex}")
    assert ways(share_upstream(first, afar, SOURCE, 0)[2]) == {Way.STREAMED}
    back = corpus_at(tmp_path / "back")
    assert ways(share_upstream(afar, back, SOURCE, 0)[2]) == {Way.STREAMED}
    assert upstream_of(first) == upstream_of(afar) == upstream_of(back)


def test_bytes_that_changed_are_not_streamed(first):
    afar = corpus_at(f"memory://{uuid.uuid4().hex}")
    with open(first.local_path(first.record("raw", SOURCE, 0), "tar"), "r+b") as stream:
        stream.seek(600)
        stream.write(b"?")
    with pytest.raises(ShardError, match="hash"):
        share_upstream(first, afar, SOURCE, 0)
    assert afar.shards("raw") == []


def test_another_shard_in_its_place_stays(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    other = commit_raw(second, [IMAGES[0][0]])
    with pytest.raises(ShardError, match="already and is another one"):
        share_upstream(first, second, SOURCE, 0)
    assert second.record("raw", SOURCE, 0) == other


def test_what_is_not_there_or_stale_is_refused(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    with pytest.raises(ShardError, match="raw/web/00007 is not in"):
        share_upstream(first, second, SOURCE, 7)
    raw = first.record("raw", SOURCE, 0)
    commit_raw(first, [row for row, _ in IMAGES[:5]], replace=raw)
    with pytest.raises(ShardError, match="captions/web/00000 is stale"):
        share_upstream(first, second, SOURCE, 0)
    assert second.shards("captions") == []


@pytest.mark.parametrize("fault", [Died, OSError])
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_fault_at_any_operation_leaves_whole_shards_and_the_next_attempt_the_same(
    first, tmp_path, how, fault
):
    undisturbed = corpus_at(tmp_path / "undisturbed")
    share_upstream(first, undisturbed, SOURCE, 0)
    at = 0
    while True:
        at += 1
        second = corpus_at(tmp_path / f"{at}")
        real = second.store.fs
        second.store.fs = faulty = FaultyFs(real, at, how, fault)
        with contextlib.suppress(Died, OSError, ShardError):
            share_upstream(first, second, SOURCE, 0)
        second.store.fs = real
        for record in [*second.shards("raw"), *second.shards("captions")]:
            for suffix in record.files:
                second.open(record, suffix).close()
        share_upstream(first, second, SOURCE, 0)
        second.sweep()
        assert tree(second) == tree(undisturbed)
        if faulty.num_operations < at:
            break
    assert at > 5


def test_of_racing_sharers_all_get_the_same(first, tmp_path):
    second = corpus_at(tmp_path / "second")
    found, barrier = [], threading.Barrier(4)

    def run():
        barrier.wait()
        found.append(share_upstream(first, Corpus(second.root), SOURCE, 0)[:2])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(each == found[0] for each in found)
    second.sweep()
    assert list(verify(second)) == []
