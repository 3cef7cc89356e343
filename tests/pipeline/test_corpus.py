"""The contract of a corpus on a local disk; test_object_storage runs its core elsewhere too."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import FIRST, SECOND, SOURCE, Recipe, ledger_bytes, rows_of, tree
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.record import Counts, RecordError, ShardRecord
from pipeline.runfile import FingerprintError, RunFileError, check_same, seal, unseal
from pipeline.sample import ShardError
from pipeline.tar import read_samples
from pipeline.verify import verify

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture
def corpus(tmp_path):
    return Corpus(str(tmp_path / "corpus"))


def names(corpus):
    return sorted(tree(corpus))


# Commits


def test_a_shard_is_three_files_under_its_source(corpus):
    record = Recipe().commit(corpus, index=42)
    assert names(corpus) == [f"raw/{SOURCE}/00042.{s}" for s in ("json", "parquet", "tar")]
    assert record.name == f"raw/{SOURCE}/00042"
    assert {s: (f.bytes, f.sha256) for s, f in record.files.items()} == {
        suffix: (len(data), hashlib.sha256(data).hexdigest())
        for suffix, data in Recipe().files("raw", 42).items()
    }


def test_the_same_inputs_give_the_same_marker_anywhere(tmp_path):
    trees = []
    for name in ("a", "b"):
        corpus = Corpus(str(tmp_path / name))
        Recipe().commit(corpus, inputs="0" * 64)
        trees.append(tree(corpus))
    assert trees[0] == trees[1]


def test_a_relative_root_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = Corpus("here")
    monkeypatch.chdir("/")
    Recipe().commit(corpus)
    assert corpus.root == str(tmp_path / "here")
    assert (tmp_path / "here/raw").exists()


def test_leaving_a_writer_without_a_commit_leaves_nothing(corpus):
    def fail_halfway():
        with corpus.writer("raw", SOURCE, 0, fingerprint="f") as writer:
            Path(writer.path("tar")).write_bytes(b"half")
            Path(writer.folder, "notes").write_bytes(b"more")
            raise ConnectionError("node lost")

    with pytest.raises(ConnectionError, match="node lost"):
        fail_halfway()
    assert names(corpus) == []
    assert corpus.shards("raw") == []


def test_files_that_were_asked_for_but_not_written_fail_the_commit(corpus):
    def forget():
        with corpus.writer("raw", SOURCE, 0, fingerprint="f") as writer:
            writer.path("tar")
            writer.commit(rows_in=0, counts=Counts())

    with pytest.raises(FileNotFoundError):
        forget()
    assert names(corpus) == []


def test_rows_that_got_lost_fail_the_commit(corpus):
    def lose_one():
        with corpus.writer("raw", SOURCE, 0, fingerprint="f") as writer:
            writer.commit(rows_in=10, counts=Counts(kept=7, dropped={"small": 2}))

    with pytest.raises(ValueError, match="10 rows went in, 9"):
        lose_one()
    assert names(corpus) == []


def test_a_second_attempt_gets_the_first_ones_shard(corpus):
    first = Recipe(FIRST).commit(corpus)
    before = tree(corpus)
    assert Recipe(SECOND).commit(corpus) == first
    assert tree(corpus) == before


def test_a_replacement_takes_the_place_of_the_shard_it_names(corpus):
    first = Recipe(FIRST).commit(corpus)
    second = Recipe(SECOND).commit(corpus, replace=first)
    assert second.fingerprint == SECOND
    assert corpus.record("raw", SOURCE, 0) == second
    assert len(names(corpus)) == 3


def test_a_replacement_of_what_was_replaced_meanwhile_gets_the_newer_shard(corpus):
    first = Recipe(FIRST).commit(corpus)
    second = Recipe(SECOND).commit(corpus, replace=first)
    assert Recipe("third").commit(corpus, replace=first) == second
    assert len(names(corpus)) == 3


def test_a_replacement_without_some_file_removes_the_old_one(corpus):
    first = Recipe(FIRST).commit(corpus)
    with corpus.writer("raw", SOURCE, 0, fingerprint="f", replace=first) as writer:
        writer.commit(rows_in=0, counts=Counts())
    assert names(corpus) == [f"raw/{SOURCE}/00000.json"]


def test_a_replacement_mends_a_file_that_has_rotted(corpus):
    first = Recipe(FIRST).commit(corpus)
    path = Path(corpus.local_path(first, "tar"))
    data = path.read_bytes()
    path.write_bytes(b"\0" + data[1:])
    assert Recipe(FIRST).commit(corpus, replace=first) == first
    assert path.read_bytes() == data


def test_a_damaged_marker_counts_as_absent_and_is_replaced(corpus, caplog):
    record = Recipe(FIRST).commit(corpus)
    before = tree(corpus)
    marker = Path(corpus.root, f"{record.name}.json")
    marker.write_bytes(marker.read_bytes()[:-20])
    assert corpus.record("raw", SOURCE, 0) is None
    assert corpus.shards("raw") == []
    assert "00000.json is passed over" in caplog.text
    Recipe(FIRST).commit(corpus)
    assert tree(corpus) == before


def test_a_marker_that_was_moved_is_not_that_shards(corpus):
    record = Recipe().commit(corpus)
    folder = Path(corpus.root, "raw", SOURCE)
    (folder / "00000.json").rename(folder / "00001.json")
    assert corpus.record("raw", SOURCE, 1) is None
    assert [f.problem for f in verify(corpus) if f.index == 1] == [
        f"it is the marker of {record.name}"
    ]


@pytest.mark.parametrize(
    ("stage", "source", "index"),
    [("row", "s", 0), ("raw", "../s", 0), ("raw", "", 0), ("raw", "S", 0), ("raw", "s", -1)],
)
def test_a_shard_may_only_be_called_what_a_path_can_hold(corpus, stage, source, index):
    with pytest.raises(ValueError, match="stage|source|negative"):
        corpus.record(stage, source, index)


@pytest.mark.parametrize("suffix", ["json", "../tar", "", "TAR", "a.b"])
def test_a_file_may_only_have_a_plain_suffix(corpus, suffix):
    with (
        corpus.writer("raw", SOURCE, 0, fingerprint="f") as writer,
        pytest.raises(ValueError, match="suffix"),
    ):
        writer.path(suffix)


# Reading


def test_shards_are_listed_by_source_and_index(corpus):
    for index in (100_000, 3, 12):
        Recipe().commit(corpus, index=index)
    with corpus.writer("raw", "another", 7, fingerprint="f") as writer:
        writer.commit(rows_in=0, counts=Counts())
    listed = [(r.source, r.index) for r in corpus.shards("raw")]
    assert listed == [("another", 7), (SOURCE, 3), (SOURCE, 12), (SOURCE, 100_000)]
    assert corpus.sources("raw") == ["another", SOURCE]
    assert [r.index for r in corpus.shards("raw", "another")] == [7]
    assert corpus.shards("clean") == []
    assert corpus.sources("captions") == []


def test_a_committed_file_reads_as_it_was_written(corpus, tmp_path):
    record = Recipe().commit(corpus)
    data = Recipe().files("raw", 0)["tar"]
    with corpus.open(record, "tar") as stream:
        assert stream.read() == data
        stream.seek(512)
        assert stream.read(5) == data[512:517]
    for _ in range(2):
        copy = corpus.local_copy(record, "tar", str(tmp_path / "cache"))
        assert Path(copy).read_bytes() == data
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert Path(corpus.local_path(record, "tar")).read_bytes() == data


def test_an_empty_shard_is_a_shard(corpus):
    recipe = Recipe(num_rows=0)
    record = recipe.commit(corpus)
    assert corpus.shards("raw") == [record]
    with corpus.open(record, "tar") as stream:
        assert list(read_samples(stream, shard=record.name, on_fault=pytest.fail)) == []
    with corpus.open(record, "parquet") as stream:
        assert pq.read_table(stream).num_rows == 0
    assert [f for f in verify(corpus) if f.stage] == []


def test_a_file_that_is_not_what_was_committed_is_not_read(corpus, tmp_path):
    record = Recipe().commit(corpus)
    path = Path(corpus.local_path(record, "tar"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(ShardError, match="hash"):
        corpus.local_copy(record, "tar", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match="10,239 bytes, not 10,240.*delete raw/demo/00000.json"):
        corpus.open(record, "tar")
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        corpus.open(record, "tar")
    with pytest.raises(ValueError, match="no png, only parquet, tar"):
        corpus.open(record, "png")


def test_a_reader_that_holds_a_replaced_record_is_told(corpus):
    first = Recipe(FIRST).commit(corpus)
    Recipe("another content, and a longer one" * 400).commit(corpus, replace=first)
    with pytest.raises(ShardError, match="replaced"):
        corpus.open(first, "tar")


# Sweeping


def test_a_sweep_removes_debris_and_spares_shards_and_strangers(corpus):
    record = Recipe().commit(corpus)
    folder = Path(corpus.root, "raw", SOURCE)
    kept = ["notes.txt", "00000_stats.json", "0000.tar", "000001.tar"]
    debris = ["00000.tar.0123456789abcdef", "00007.tar", "00007.parquet.0123456789abcdef"]
    debris += [".00007.json.abc", "00000.png"]
    for name in kept + debris:
        (folder / name).write_bytes(b"x")
    (folder / ".00008.abc").mkdir()
    (folder / ".00008.abc" / "tar").write_bytes(b"x")
    swept = corpus.sweep("raw")
    assert sorted(swept.removed) == sorted(f"raw/{SOURCE}/{n}" for n in [*debris, ".00008.abc"])
    assert {path.name for path in folder.iterdir()} == {
        *kept,
        "00000.tar",
        "00000.json",
        "00000.parquet",
    }
    assert corpus.shards("raw") == [record]
    assert corpus.sweep().removed == ()


def test_a_sweep_spares_the_files_of_a_damaged_marker(corpus):
    record = Recipe().commit(corpus)
    marker = Path(corpus.root, f"{record.name}.json")
    marker.write_bytes(b"{")
    assert corpus.sweep().removed == ()
    assert len(names(corpus)) == 3


# Markers


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.dictionaries(TEXTS, st.integers(1, 2**60), max_size=3)
RECORDS = st.builds(
    lambda kept, dropped, failed, **fields: ShardRecord(
        rows_in=kept + sum(dropped.values()) + sum(failed.values()),
        counts=Counts(kept=kept, dropped=dropped, failed=failed),
        files={},
        **fields,
    ).sealed(),
    kept=st.integers(0, 2**60),
    dropped=COUNTS,
    failed=COUNTS,
    stage=st.sampled_from(["raw", "captions", "clean"]),
    source=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,9}", fullmatch=True),
    index=st.integers(0, 2**40),
    stats=st.dictionaries(
        TEXTS,
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    fingerprint=TEXTS,
)


@given(RECORDS)
def test_a_marker_is_read_back_as_it_was(record):
    assert ShardRecord.from_bytes(record.to_bytes()) == record


@given(RECORDS, st.data())
def test_any_changed_byte_of_a_marker_is_noticed(record, data):
    marker = bytearray(record.to_bytes())
    at = data.draw(st.integers(0, len(marker) - 1))
    marker[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        ShardRecord.from_bytes(bytes(marker))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 10**5, b"1" * 5000, b"null"])
def test_what_is_no_marker_is_called_so(data):
    with pytest.raises(RecordError, match="not a marker"):
        ShardRecord.from_bytes(data)


# Ledgers


def test_a_ledger_counts_what_became_of_its_rows(tmp_path):
    path = str(tmp_path / "ledger.parquet")
    schema = ledger_schema([pa.field("clip", pa.float32())])
    rows = [{**row, "clip": 0.25} for row in rows_of(3, 25)]
    with LedgerWriter(path, schema, rows_per_group=10) as ledger:
        for row in rows:
            ledger.write(row)
    assert ledger.counts == Counts(kept=9, dropped={"too_small": 8}, failed={"http_404": 8})
    assert ledger.num_rows == ledger.counts.total == 25
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [10, 10, 5]
    assert file.read().to_pylist() == rows
    assert b"pandas" not in (file.schema_arrow.metadata or {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"verdict": "maybe"}, "maybe"),
        ({"reason": "odd"}, "reason 'odd'"),
        ({"verdict": "dropped"}, "reason ''"),
    ],
)
def test_a_row_that_would_not_add_up_is_refused(tmp_path, change, message):
    with LedgerWriter(str(tmp_path / "l.parquet"), ledger_schema()) as ledger:
        with pytest.raises(ValueError, match=message):
            ledger.write({**next(rows_of(0, 1)), **change})
        assert ledger.num_rows == 0


def test_a_ledger_needs_its_columns(tmp_path):
    with pytest.raises(ValueError, match="reason"):
        LedgerWriter(str(tmp_path / "l.parquet"), pa.schema([("key", pa.string())]))


def test_ledger_bytes_are_the_same_in_another_process():
    program = (
        "import hashlib, corpora\n"
        "data = corpora.ledger_bytes(corpora.rows_of(1, 100))\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    expected = hashlib.sha256(ledger_bytes(rows_of(1, 100))).hexdigest()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


# The run's description


def test_the_first_run_writes_the_description_and_later_ones_read_it(corpus):
    assert corpus.read_run() is None
    assert corpus.write_run("seed: 1\n# ü") == "seed: 1\n# ü\n"
    assert corpus.write_run("seed: 2") == "seed: 1\n# ü\n"
    assert corpus.read_run() == "seed: 1\n# ü\n"
    assert names(corpus) == ["run.yaml"]


@given(TEXTS, st.data())
def test_any_changed_byte_of_the_description_is_noticed(text, data):
    sealed = bytearray(seal(text))
    assert unseal(bytes(sealed)).rstrip("\n") == text.rstrip("\n")
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RunFileError, match="hash"):
        unseal(bytes(sealed))


def test_a_changed_recipe_stops_and_names_the_keys():
    stored = {"score": {"top_p": 0.9, "num": 10}, "sources": ["cc3m"], "old": {}}
    current = {"score": {"top_p": 0.8, "num": 10}, "sources": ["cc3m"], "new": 1}
    check_same(stored, dict(stored))
    with pytest.raises(FingerprintError) as caught:
        check_same(stored, current)
    assert list(caught.value.differences) == ["new", "old", "score.top_p"]
    assert "score.top_p: 0.9 in run.yaml, 0.8 now" in str(caught.value)
    assert "new: absent in run.yaml, 1 now" in str(caught.value)


def test_a_sweep_spares_an_attempt_that_is_alive_and_removes_one_that_is_not(tmp_path):
    corpus = Corpus(str(tmp_path))
    with corpus.writer("raw", SOURCE, 0, fingerprint="f") as writer:
        Path(writer.path("tar")).write_bytes(b"in the making")
        assert Corpus(str(tmp_path)).sweep().removed == ()
        assert Path(writer.path("tar")).exists()
    dead = tmp_path / "raw" / SOURCE / ".00001.gone1234"
    dead.mkdir()
    assert corpus.sweep().removed == (f"raw/{SOURCE}/.00001.gone1234",)
    assert not dead.exists()
