"""verify finds every changed bit and every row that went missing, and survives what it finds."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import RECIPES, SECOND, SOURCE, Recipe, build, ledger_bytes, rows_of, tar_bytes

from pipeline.corpus import Corpus
from pipeline.record import Counts
from pipeline.verify import Severity, verify


@pytest.fixture
def corpus(tmp_path):
    corpus = Corpus(str(tmp_path / "corpus"))
    build(corpus, 2)
    return corpus


def file(corpus, name):
    return Path(corpus.root, name)


def test_a_whole_corpus_has_no_faults(corpus):
    assert list(verify(corpus)) == []
    assert list(verify(corpus, quick=True)) == []


def a_small_corpus(tmp_path):
    corpus = Corpus(str(tmp_path / "small"))
    corpus.write_run("recipe: 1\nseed: 2\n")
    Recipe().commit(corpus)
    return corpus


@pytest.mark.parametrize("name", ["run.yaml", f"raw/{SOURCE}/00000.json"])
def test_any_flipped_bit_of_a_marker_or_the_run_file_is_found(tmp_path, name):
    corpus = a_small_corpus(tmp_path)
    path = file(corpus, name)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            found = [fault.file for fault in verify(corpus, quick=True)]
            assert name in found, f"bit {bit} of byte {at}"
    path.write_bytes(whole)
    assert list(verify(corpus)) == []


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_any_flipped_byte_of_a_data_file_is_found(tmp_path, suffix):
    corpus = a_small_corpus(tmp_path)
    path = file(corpus, f"raw/{SOURCE}/00000.{suffix}")
    draw = random.Random(0)
    whole = bytearray(path.read_bytes())
    # All the headers and data, and a sample of a tar's padding, which is most of it.
    for at in [*range(len(whole))[:4096], *range(4096, len(whole), 37), len(whole) - 1]:
        flipped = whole[at] ^ draw.randrange(1, 256)
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([flipped]))
        assert [(f.file, f.severity) for f in verify(corpus)] == [
            (f"raw/{SOURCE}/00000.{suffix}", Severity.FAULT)
        ], f"byte {at}"
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(whole[at : at + 1])
    assert list(verify(corpus)) == []


def test_each_fault_says_where_and_what_to_do(corpus):
    path = file(corpus, f"raw/{SOURCE}/00001.tar")
    path.write_bytes(path.read_bytes()[:-512])
    (fault,) = verify(corpus, quick=True)
    assert (fault.stage, fault.source, fault.index) == ("raw", SOURCE, 1)
    assert str(fault) == (
        "fault raw/demo/00001.tar: it has 9,728 bytes, 10,240 were committed; "
        "delete raw/demo/00001.json and run again"
    )


def test_one_fault_does_not_hide_the_next(corpus):
    for name in ("raw/demo/00000.tar", "captions/demo/00001.parquet", "clean/demo/00000.json"):
        path = file(corpus, name)
        path.write_bytes(b"x" + path.read_bytes()[1:])
    file(corpus, "clean/demo/00001.tar").unlink()
    file(corpus, "run.yaml").unlink()
    assert {fault.file for fault in verify(corpus) if fault.severity == Severity.FAULT} == {
        "raw/demo/00000.tar",
        "captions/demo/00001.parquet",
        "clean/demo/00000.json",
        "clean/demo/00001.tar",
        "run.yaml",
    }


def test_what_was_mended_as_told_is_whole_again(corpus):
    before = {p: p.read_bytes() for p in Path(corpus.root).rglob("*.*")}
    path = file(corpus, f"clean/{SOURCE}/00000.tar")
    path.write_bytes(b"")
    (fault,) = verify(corpus)
    assert fault.mend == f"delete clean/{SOURCE}/00000.json and run again"
    file(corpus, f"clean/{SOURCE}/00000.json").unlink()
    build(corpus, 2)
    assert list(verify(corpus)) == []
    assert {p: p.read_bytes() for p in Path(corpus.root).rglob("*.*")} == before


def test_a_shard_made_from_what_was_replaced_is_stale(corpus):
    raw = corpus.record("raw", SOURCE, 0)
    Recipe("third").commit(corpus, replace=raw)
    (fault,) = verify(corpus)
    assert fault.file == f"captions/{SOURCE}/00000.json"
    assert "stale" in fault.problem


def test_a_shard_without_what_it_was_made_from_is_a_fault(corpus):
    for suffix in ("json", "tar", "parquet"):
        file(corpus, f"raw/{SOURCE}/00000.{suffix}").unlink()
    (fault,) = verify(corpus)
    assert f"raw/{SOURCE}/00000, which does not exist" in fault.problem


def test_clean_must_account_for_every_raw_row(corpus):
    captions = corpus.record("captions", SOURCE, 0)
    fewer = Recipe(num_rows=3)
    fewer.commit(
        corpus, "clean", 0, inputs=captions.sha256, replace=corpus.record("clean", SOURCE, 0)
    )
    (fault,) = verify(corpus, quick=True)
    assert "3 rows" in fault.problem
    assert "4" in fault.problem


def commit_files(corpus, counts, **files):
    with corpus.writer("raw", SOURCE, 9, fingerprint="f") as writer:
        for suffix, data in files.items():
            Path(writer.path(suffix)).write_bytes(data)
        writer.commit(rows_in=counts.total, counts=counts)


def table_bytes(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


KEPT = Counts(kept=1)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no ledger"),
        (b"PAR1" + b"x" * 100 + b"PAR1", "no ledger"),
        (table_bytes(pa.table({"key": ["a"]})), "no ledger"),
        (table_bytes(pa.table({"key": ["a"], "verdict": [1], "reason": [""]})), "no ledger"),
        (
            table_bytes(pa.table({"key": [None], "verdict": ["kept"], "reason": [""]})),
            "no ledger: a row has no key",
        ),
        (
            table_bytes(pa.table({"key": ["a"], "verdict": ["failed"], "reason": ["odd"]})),
            "'failed': {'odd': 1}",
        ),
    ],
)
def test_a_committed_file_that_is_no_ledger_of_these_rows_is_a_fault(tmp_path, data, problem):
    corpus = Corpus(str(tmp_path))
    corpus.write_run("a: 1")
    commit_files(corpus, KEPT, parquet=data)
    (fault,) = verify(corpus)
    assert fault.file == f"raw/{SOURCE}/00009.parquet"
    assert problem in fault.problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"x" * 1024, "checksum"),
        (tar_bytes(["a"], "c")[:700], "cut off|are left"),
        (tar_bytes(["a", "b"], "c"), "holds 2 samples, the ledger kept 1; they differ in"),
        (tar_bytes(["zz"], "c"), "differ in"),
    ],
)
def test_a_committed_tar_that_does_not_hold_what_was_kept_is_a_fault(tmp_path, data, problem):
    corpus = Corpus(str(tmp_path))
    corpus.write_run("a: 1")
    commit_files(corpus, KEPT, parquet=ledger_bytes(rows_of(0, 1)), tar=data)
    (fault,) = verify(corpus)
    assert fault.file == f"raw/{SOURCE}/00009.tar"
    assert any(part in fault.problem for part in problem.split("|"))


def test_keys_out_of_order_are_a_fault(tmp_path):
    corpus = Corpus(str(tmp_path))
    corpus.write_run("a: 1")
    one, end = tar_bytes(["a"], "c"), 1024
    swapped = tar_bytes(["b"], "c")[: 4 * 512] + one[: 4 * 512] + bytes(end)
    rows = [dict(next(rows_of(0, 1)), key=key) for key in "ab"]
    commit_files(corpus, Counts(kept=2), parquet=ledger_bytes(rows), tar=swapped)
    (fault,) = verify(corpus)
    assert "ascend" in fault.problem


def test_what_a_crash_left_is_a_note_and_not_a_fault(corpus):
    record = corpus.record("raw", SOURCE, 0)
    folder = file(corpus, f"raw/{SOURCE}")
    staged = folder / f"00000.tar.{record.files['tar'].sha256[:16]}"
    (folder / "00000.tar").rename(staged)
    for name in ("00005.tar.0123456789abcdef", ".00005.json.abc", "notes.txt", "00006.parquet"):
        (folder / name).write_bytes(b"x")
    (folder / ".00006.abc").mkdir()
    Path(corpus.root, "raw", "Not A Source").mkdir()
    found = list(verify(corpus))
    assert {fault.severity for fault in found} == {Severity.NOTE}
    assert {fault.file.rsplit("/", 1)[-1] for fault in found} == {
        "00000.json",
        "00005.tar.0123456789abcdef",
        ".00005.json.abc",
        "00006.parquet",
        ".00006.abc",
        "notes.txt",
    }
    corpus.sweep()
    assert [fault.file for fault in verify(corpus)] == [f"raw/{SOURCE}/notes.txt"]


def test_a_missing_corpus_is_a_fault_and_no_crash(tmp_path):
    (fault,) = verify(Corpus(str(tmp_path / "nothing")))
    assert fault.file == "run.yaml"
    assert "missing" in fault.problem


def test_the_second_recipe_is_what_the_fixture_ends_with(corpus):
    assert {r.fingerprint for r in corpus.shards("raw")} == {RECIPES[SECOND].content}
