"""The whole job on a small real web: noisy titles of clip art, stamps that people described."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.corpus import Corpus
from pipeline.verify import verify

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"
RECIPE = Path(__file__).parent / "data" / "real_web.yaml"
CAPFILT = str(Path(sys.executable).with_name("capfilt"))
DEADLINE_SECONDS = 400
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve the folder and give what a recipe has to know of it."""
    lists = tmp_path_factory.mktemp("lists")
    command = [sys.executable, str(REAL / "serve.py"), "--port", "0", "--out", str(lists)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        while not line.startswith("serving on"):
            assert line, "the server ended"
            line = server.stdout.readline()
        base = line.split()[-1]
        yield [
            f"sources.web.paths=[{str(lists / 'web.parquet')!r}]",
            f"sources.stamps.paths=[{str(REAL / 'human_captions.json')!r}]",
            f"sources.stamps.base_url={base}/",
            f"fetch.allowed_ports=[{base.rpartition(':')[2]}]",
        ]
    finally:
        server.terminate()
        server.wait()


def command(root, served):
    sets = [f"--set={each}" for each in (*served, f"root={root}")]
    return [CAPFILT, "run", str(RECIPE), "--json", *sets]


def finish(root, served):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(root, served),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def undisturbed(served, tmp_path_factory):
    root = tmp_path_factory.mktemp("real") / "corpus"
    return finish(root, served), root


def rows(root, stage, columns):
    corpus = Corpus(str(root))
    for record in corpus.shards(stage):
        with corpus.open(record, "parquet") as stream:
            yield from pq.read_table(stream, columns=columns).to_pylist()


def test_what_the_server_can_serve_arrives_and_all_else_has_a_reason(undisturbed):
    _, root = undisturbed
    ledger = list(rows(root, "raw", ["key", "verdict", "reason"]))
    listed = len((REAL / "web.jsonl").read_text().splitlines())
    stamps = json.loads((REAL / "human_captions.json").read_text())["images"]
    assert len(ledger) == listed + len(stamps)
    verdicts = Counter(row["verdict"] for row in ledger)
    assert verdicts["kept"] >= 0.95 * len(ledger), verdicts
    assert all(row["reason"] for row in ledger if row["verdict"] != "kept")


def test_the_corpus_is_whole_and_no_row_is_lost_on_the_way(undisturbed):
    _, root = undisturbed
    corpus = Corpus(str(root))
    assert list(verify(corpus)) == []
    images = Counter(row["key"] for row in rows(root, "raw", ["key"]))
    assert Counter({row["key"] for row in rows(root, "captions", ["key"])}) == Counter(set(images))
    assert Counter(row["key"] for row in rows(root, "clean", ["key"])) == images
    kept = Counter(row["verdict"] for row in rows(root, "clean", ["verdict"]))["kept"]
    assert kept == sum(record.counts.kept for record in corpus.shards("clean"))


def test_there_is_a_page_and_a_trained_model(undisturbed):
    summary, root = undisturbed
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")
    assert list(summary["models"]) == ["stage1", "stage2"]
    for stage in ("captioner", "filter", "stage1", "stage2"):
        assert (root / "train" / stage / "export" / "capfilt.json").exists()


@pytest.mark.slow
def test_killed_on_the_way_it_ends_in_the_same_bytes(undisturbed, served, tmp_path):
    root = tmp_path / "corpus"
    for moment in ("raw/web/00002.json", "captions/web/00001.json"):
        killed = subprocess.Popen(
            command(root, served),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (root / moment).exists():
            assert killed.poll() is None, killed.communicate()[1]
            assert time.monotonic() < deadline, f"{moment} did not appear"
            time.sleep(0.02)  # polls
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    finish(root, served)
    assert tree(root) == tree(undisturbed[1])


def tree(root):
    """Return every committed file of all three stages."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for stage in ("raw", "captions", "clean")
        for path in sorted((root / stage).rglob("*"))
        if path.is_file()
    }
