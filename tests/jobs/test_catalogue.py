"""What a resume remembers of object storage is right, or is not used."""

import boto3
import pytest
from moto.server import ThreadedMotoServer

from jobs.catalogue import FILE, Catalogue, Place
from jobs.stages.stage import Commit
from jobs.tidy import tidy
from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter, ledger_schema

SOURCE = "web"
ROW = {"key": "k", "source": SOURCE, "url": None, "verdict": "failed", "reason": "gone"}


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    boto3.client("s3", **keys, **client).create_bucket(Bucket="corpora")
    yield {"key": "test", "secret": "test", "client_kwargs": client}
    server.stop()


@pytest.fixture
def corpus(s3, request):
    return Corpus(f"s3://corpora/{request.node.name}", s3)


def commit(corpus, index, *, fingerprint="f", replace=None):
    with (
        corpus.writer("raw", SOURCE, index, fingerprint=fingerprint, replace=replace) as writer,
        LedgerWriter(writer.path("parquet"), ledger_schema()) as ledger,
    ):
        ledger.write(ROW)
        ledger.close()
        return writer.commit(rows_in=1, counts=ledger.counts)


class CountingCorpus(Corpus):
    """Counts the markers that are read."""

    num_read = 0

    def record(self, stage, source, index):
        self.num_read += 1
        return super().record(stage, source, index)


def read_again(corpus, s3):
    """Return what another run finds, and how many markers it had to read."""
    counting = CountingCorpus(corpus.root, s3)
    found = Catalogue.load(counting).of("raw", SOURCE)
    return found, counting.num_read


def test_markers_that_a_run_has_read_are_not_read_again(corpus, s3):
    records = [commit(corpus, index) for index in range(5)]
    catalogue = Catalogue.load(corpus)
    assert list(catalogue.of("raw", SOURCE)) == [0, 1, 2, 3, 4]
    catalogue.save()
    found, num_read = read_again(corpus, s3)
    assert num_read == 0
    assert [each.sha256 for each in found.values()] == [record.sha256 for record in records]
    assert [(each.num_rows, each.num_failed) for each in found.values()] == [(1, 1)] * 5


def test_what_a_worker_says_of_its_marker_is_what_the_store_says(corpus, s3):
    record = commit(corpus, 0)
    catalogue = Catalogue(corpus)
    catalogue.note([(Place("raw", SOURCE, 0), Commit.of(record))])
    catalogue.save()
    assert read_again(corpus, s3)[1] == 0


def test_a_shard_that_was_replaced_meanwhile_is_read_again(corpus, s3):
    first = commit(corpus, 0)
    commit(corpus, 1)
    catalogue = Catalogue.load(corpus)
    catalogue.of("raw", SOURCE)
    catalogue.save()
    second = commit(corpus, 0, fingerprint="g", replace=first)
    found, num_read = read_again(corpus, s3)
    assert (num_read, found[0].sha256, found[0].fingerprint) == (1, second.sha256, "g")


def test_a_shard_that_is_gone_is_not_remembered_into_being(corpus, s3):
    record = commit(corpus, 0)
    catalogue = Catalogue.load(corpus)
    catalogue.of("raw", SOURCE)
    catalogue.save()
    corpus.store.remove(f"{record.name}.json")
    assert read_again(corpus, s3) == ({}, 0)


def test_a_damaged_memory_is_no_memory(corpus, s3):
    record = commit(corpus, 0)
    corpus.store.fs.pipe_file(corpus.store.full(FILE), b"PAR1 of something else")
    found, num_read = read_again(corpus, s3)
    assert (num_read, found[0].sha256) == (1, record.sha256)


def test_a_local_disk_is_read_and_not_remembered(tmp_path):
    corpus = Corpus(str(tmp_path))
    record = commit(corpus, 3)
    catalogue = Catalogue.load(corpus)
    assert catalogue.of("raw", SOURCE)[3].sha256 == record.sha256
    catalogue.save()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "debris", [".00001.abc/tar", "00001.tar.0123456789abcdef", "00001.tar", ".00000.json.abc"]
)
def test_debris_is_seen_from_a_listing_and_swept(tmp_path, debris):
    corpus = Corpus(str(tmp_path))
    record = commit(corpus, 0)
    path = tmp_path / "raw" / SOURCE / debris
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    tidy(corpus)
    assert sorted(each.name for each in (tmp_path / "raw" / SOURCE).iterdir()) == [
        "00000.json",
        "00000.parquet",
    ]
    assert corpus.shards("raw") == [record]


def test_a_tidy_corpus_is_not_swept(tmp_path):
    corpus = Corpus(str(tmp_path))
    commit(corpus, 0)
    corpus.sweep = None  # nobody may ask for it
    tidy(corpus)
