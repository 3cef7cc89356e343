"""What others wrote is taken in, what is written others read: img2dataset, webdataset, pandas.

Folders that `capfilt export` writes are loaded by transformers in tests/jobs/test_whole.py.
"""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import blip_folders
import download_jobs
import duckdb
import hub_cache
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from scripted_server import ScriptedServer, http

import jobs.cli
from pipeline.corpus import Corpus
from pipeline.verify import verify

NUM_ROWS, ROWS_PER_SHARD = 40, 16
COMMIT = "c0ffee" * 6 + "c0ff"
IMG2DATASET = """\
from img2dataset import download

if __name__ == "__main__":
    download(
        url_list="list.csv", input_format="csv", caption_col="caption", output_folder="images",
        output_format="webdataset", processes_count=1, thread_count=4, image_size=64,
        resize_mode="keep_ratio", resize_only_if_bigger=True, number_sample_per_shard=16, timeout=5,
        extract_exif=False,
    )
"""


def answer(request):
    """Some are gone, some are broken, some refuse, the others are pictures."""
    number = download_jobs.number_of(request)
    data = download_jobs.picture(number)
    match number % 10:
        case 3:
            return http("404 Not Found", b"gone")
        case 5:
            return http(body=b"no image", Content_Type="image/jpeg")
        case 7:
            return http(body=data, X_Robots_Tag="noai")
    return http(body=data, Content_Type="image/jpeg")


@pytest.fixture(scope="module")
def made_by_img2dataset(tmp_path_factory):
    """A folder of img2dataset's own making, downloaded by it from a server on loopback."""
    folder = tmp_path_factory.mktemp("img2dataset")
    with ScriptedServer(answer) as server:
        with (folder / "list.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["url", "caption"])
            rows.writerows(
                [server.url(f"/{number}"), f"a red cat on box {number}"]
                for number in range(NUM_ROWS)
            )
        (folder / "make.py").write_text(IMG2DATASET)
        done = subprocess.run(
            [sys.executable, "make.py"],
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"WANDB_MODE": "disabled"},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return folder / "images"


@pytest.fixture(scope="module")
def world(made_by_img2dataset, tmp_path_factory):
    """A run from that folder to clean shards, with tiny models of a hub's cache; its summary."""
    folder = tmp_path_factory.mktemp("run")
    blip_folders.save_captioner(folder / "captioner")
    blip_folders.save_filter(folder / "filter")
    for name in ("captioner", "filter"):
        hub_cache.put(folder / "hub", f"tiny/{name}", {COMMIT: folder / name}, main=COMMIT)
    recipe = {
        "name": "imported",
        "root": str(folder / "corpus"),
        "sources": [{"name": "web", "format": "img2dataset", "paths": [str(made_by_img2dataset)]}],
        "download": {
            "rows_per_shard": ROWS_PER_SHARD, "image_size_px": 64, "is_original_kept": True
        },
        "captioner": {"name": "tiny/captioner", "max_length": 12, "min_length": 0},
        "scorer": {"filter": {"name": "tiny/filter", "revision": COMMIT}, "clip": None},
        "select": {"policy": "blip", "itm_threshold": 0.5},
        "run": {"engine": "local"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    torch.set_num_threads(1)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            jobs.cli.main(["run", str(folder / "recipe.yaml"), "--json"])
    assert ended.value.code == 0
    return Corpus(str(folder / "corpus")), json.loads(output.getvalue())


def ledger(corpus, stage):
    tables = []
    for record in corpus.shards(stage, "web"):
        with corpus.open(record, "parquet") as stream:
            tables += pq.read_table(stream).to_pylist()
    return tables


# --- img2dataset's folders come in ---------------------------------------------------------------


def test_every_row_of_img2dataset_is_a_row_with_its_verdict(world, made_by_img2dataset):
    theirs = pd.concat(
        pd.read_parquet(path) for path in sorted(made_by_img2dataset.glob("*.parquet"))
    )
    ours = ledger(world[0], "raw")
    assert version("img2dataset").startswith("1.47")
    assert [row["url"] for row in ours] == list(theirs.url)
    assert [row["status"] for row in ours] == list(theirs.status)
    assert [row["caption"] for row in ours] == list(theirs.caption)
    assert [json.loads(row["extra"])["key"] for row in ours] == list(theirs.key)
    reasons = Counter(row["reason"] for row in ours)
    assert reasons == {"": 28, "failed_to_download": 8, "failed_to_resize": 4}
    messages = {row["error_message"] for row in ours if row["reason"] == "failed_to_download"}
    assert any("404" in message for message in messages)
    assert list(verify(world[0])) == []


def test_img2datasets_images_arrive_byte_for_byte_under_our_keys(world, made_by_img2dataset):
    theirs = {
        sample["__key__"]: sample["jpg"]
        for path in sorted(made_by_img2dataset.glob("*.tar"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    ours = {}
    for record in world[0].shards("raw", "web"):
        path = Path(world[0].root) / f"{record.name}.tar"
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            assert re.fullmatch(rf"{record.index:05d}\d\d", sample["__key__"])
            ours[json.loads(sample["json"])["extra"]["key"]] = sample["jpg"]
    assert len(ours) == 28
    assert ours == theirs


def test_what_follows_says_by_which_commit_it_was_made(world):
    for record in world[0].shards("captions", "web"):
        models = record.stats["models"]
        assert models["captioner"] == {"name": "tiny/captioner", "revision": COMMIT}
        assert models["filter"] == {"name": "tiny/filter", "revision": COMMIT}


# --- clean shards go out -------------------------------------------------------------------------


def tars(corpus):
    return [f"{corpus.root}/{record.name}.tar" for record in corpus.shards("clean", "web")]


def spans(corpus):
    """Image and metadata of every kept sample by its key, cut out by the ledger's offsets."""
    found = {}
    for record in corpus.shards("clean", "web"):
        data = Path(f"{corpus.root}/{record.name}.tar").read_bytes()
        with corpus.open(record, "parquet") as stream:
            for row in pq.read_table(stream).to_pylist():
                if row["verdict"] == "kept":
                    start, end = row["image_offset"], row["image_offset"] + row["image_bytes"]
                    image = data[start:end]
                    start, end = row["json_offset"], row["json_offset"] + row["json_bytes"]
                    found[row["key"]] = image, json.loads(data[start:end]), row["captions"]
    return found


def test_webdataset_reads_clean_shards_unchanged(world):
    corpus, _ = world
    ours = spans(corpus)
    theirs = {
        sample["__key__"]: sample
        for sample in webdataset.WebDataset(tars(corpus), shardshuffle=False)
    }
    assert theirs.keys() == ours.keys()
    assert 0 < len(theirs) <= 28
    for key, (image, fields, captions) in ours.items():
        assert theirs[key]["jpg"] == image
        assert theirs[key]["txt"].decode() == captions[0]["text"]
        assert json.loads(theirs[key]["json"]) == fields


def test_datasets_reads_clean_shards_unchanged(world, tmp_path):
    import datasets  # brings a second's worth of imports

    corpus, _ = world
    ours = spans(corpus)
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tars(corpus)}, split="train", cache_dir=str(tmp_path)
    )
    assert {"__key__", "jpg", "txt", "json"} <= set(loaded.column_names)
    assert loaded[0]["jpg"].size == Image.open(io.BytesIO(ours[loaded[0]["__key__"]][0])).size
    loaded = loaded.cast_column("jpg", datasets.Image(decode=False))  # the bytes themselves
    assert sorted(loaded["__key__"]) == sorted(ours)
    for row in loaded:
        image, fields, captions = ours[row["__key__"]]
        assert row["jpg"]["bytes"] == image
        assert row["txt"] == captions[0]["text"]
        assert without_nulls(row["json"]) == without_nulls(fields)


def without_nulls(value):
    """A table gives every row the fields that any row has: those that it has not are null."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


# --- ledgers and sidecars as tables --------------------------------------------------------------


def told(summary, stage):
    """What a run said that became of its rows, by (verdict, reason)."""
    rows = summary["stages"][stage]["rows"]
    pairs = {tuple(name.split(": ")) if ": " in name else (name, ""): n for name, n in rows.items()}
    return {pair: n for pair, n in pairs.items() if n}


@pytest.mark.parametrize(("folder", "stage"), [("raw", "download"), ("clean", "select")])
def test_counts_of_pandas_and_duckdb_are_the_runs_own(world, folder, stage):
    corpus, summary = world
    files = f"{corpus.root}/{folder}/*/*.parquet"
    by_sql = duckdb.sql(
        f"SELECT verdict, reason, count(*) FROM '{files}' GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    table = pd.concat(
        pd.read_parquet(path) for path in Path(corpus.root, folder).glob("*/*.parquet")
    )
    by_pandas = table.groupby(["verdict", "reason"]).size().to_dict()
    assert {(verdict, reason): n for verdict, reason, n in by_sql} == by_pandas
    assert by_pandas == told(summary, stage)
    assert sum(by_pandas.values()) == NUM_ROWS
    markers = [record.counts for record in corpus.shards(folder, "web")]
    assert by_pandas["kept", ""] == sum(counts.kept for counts in markers)


def test_sidecars_and_ledgers_join_in_sql(world):
    """Other processors may draw other texts, or an empty one, which has no score: so none is told.

    Every web caption has words and a score.
    """
    corpus, _ = world
    query = f"""
        SELECT captions.origin, count(*), avg(itm)
        FROM '{corpus.root}/captions/*/*.parquet' AS captions
        JOIN '{corpus.root}/raw/*/*.parquet' AS raw USING (source, key)
        WHERE itm IS NOT NULL AND raw.verdict = 'kept' GROUP BY ALL ORDER BY ALL"""
    by_sql = {origin: (number, itm) for origin, number, itm in duckdb.sql(query).fetchall()}
    table = pd.concat(
        pd.read_parquet(path) for path in Path(corpus.root, "captions").glob("*/*.parquet")
    )
    scored = table[(table.origin == "web") | (table.text.str.strip() != "")]
    assert scored.itm.notna().all()
    by_pandas = scored.groupby("origin").itm.agg(["count", "mean"])
    assert {origin: number for origin, (number, _) in by_sql.items()} == dict(by_pandas["count"])
    assert by_sql["web"][0] == told(world[1], "download")["kept", ""]
    for origin, (_, itm) in by_sql.items():
        assert itm == pytest.approx(by_pandas["mean"][origin], abs=1e-6)


def test_a_threshold_may_be_tried_in_sql_before_it_is_selected(world):
    """What a clean ledger says of a caption is what its score says."""
    corpus, _ = world
    rows = duckdb.sql(
        f"""
        SELECT c.verdict, (c.itm >= 0.5) AS matches, count(*)
        FROM (SELECT unnest(captions) AS c FROM '{corpus.root}/clean/*/*.parquet')
        WHERE c.itm IS NOT NULL GROUP BY ALL"""
    ).fetchall()
    assert {(verdict, matches) for verdict, matches, _ in rows} <= {
        ("kept", True), ("dropped", False), ("dropped", True)
    }  # fmt: skip
    assert any(matches for _, matches, _ in rows)
