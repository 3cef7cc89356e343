"""Folders of img2dataset are taken as they are: every row, its reason, and no trust in the tars."""

import io
import json
import tarfile

import download_jobs as jobs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import Corpus
from pipeline.download import Downloader
from pipeline.fetch import Fetcher
from pipeline.sources.config import SourceConfig
from pipeline.sources.rows import (
    DownloadedImage,
    ElsewhereReason,
    MalformedRow,
    NotDownloaded,
    SourceError,
)
from pipeline.sources.shards import plan_shards, read_shard, read_source
from pipeline.verify import verify

STATUSES = ("success", "failed_to_download", "success", "failed_to_resize", "success", "success")
MESSAGES = (None, "HTTP Error 404: Not Found", None, "image decoding error", None, None)


def shard(folder, number, statuses=STATUSES, messages=MESSAGES):
    """Write a shard as img2dataset does: Parquet, tar and, last, the stats."""
    folder.mkdir(exist_ok=True)
    keys = [f"{number:05d}{position:04d}" for position in range(len(statuses))]
    columns = {
        "url": [f"http://x.org/{key}" for key in keys],
        "caption": [f"picture {key}" for key in keys],
        "key": keys,
        "status": list(statuses),
        "error_message": list(messages),
        "width": [96] * len(keys),
        "exif": ["{}"] * len(keys),
    }
    pq.write_table(pa.table(columns), folder / f"{number:05d}.parquet")
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for position, (key, status) in enumerate(zip(keys, statuses, strict=True)):
            if status == "success":
                add(tar, f"{key}.jpg", jobs.picture(position))
                add(tar, f"{key}.json", json.dumps({"key": key}).encode())
                add(tar, f"{key}.txt", f"picture {key}".encode())
    (folder / f"{number:05d}_stats.json").write_text("{}")
    return folder / f"{number:05d}.tar"


def add(tar, name, data, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    tar.addfile(member, io.BytesIO(data))


def config_of(folder, **changes):
    return SourceConfig(name="web", format="img2dataset", paths=(str(folder),), **changes)


def failures(rows):
    return {
        row.extra["key"][-1]: row.location.reason
        for row in rows
        if isinstance(row.location, NotDownloaded)
    }


@pytest.fixture
def folder(tmp_path):
    shard(tmp_path / "images", 0)
    return tmp_path / "images"


def test_every_row_is_read_with_its_caption_its_key_and_what_became_of_it(folder):
    shard(folder, 1)
    rows = list(read_source(config_of(folder)))
    assert [row.extra for row in rows] == [
        {"key": f"{number:05d}{position:04d}"} for number in (0, 1) for position in range(6)
    ]
    assert rows[0].captions == ("picture 000000000",)
    assert isinstance(rows[0].location, DownloadedImage)
    lost = rows[1].location
    assert lost.reason is ElsewhereReason.FAILED_TO_DOWNLOAD
    assert lost.detail == "HTTP Error 404: Not Found"
    assert rows[3].location.reason is ElsewhereReason.FAILED_TO_RESIZE
    assert [row.url for row in rows[:2]] == ["http://x.org/000000000", "http://x.org/000000001"]


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_shards_of_any_size_hold_the_same_rows(folder, size):
    shard(folder, 1)
    config = config_of(folder)
    shards = list(plan_shards(config, records_per_shard=size))
    rows = [row for each in shards for row in read_shard(config, each)]
    assert rows == list(read_source(config))
    thinned = config.model_copy(update={"one_in": 5})
    assert list(read_source(thinned)) == rows[::5]


def downloaded(config, root):
    """Make the raw shard of a source; returns its ledger and the members of its tar."""
    corpus = Corpus(str(root))
    corpus.write_run("a: run\n")
    rows = read_source(config)
    settings = jobs.download_config(image_size_px=96, is_original_kept=True)
    with Fetcher(jobs.fetch_config()) as fetcher:
        downloader = Downloader(corpus, settings, fetcher, fingerprint="f")
        record = downloader.download("web", 0, rows).record
    with corpus.open(record, "parquet") as stream:
        ledger = pq.read_table(stream).to_pylist()
    with corpus.open(record, "tar") as stream, tarfile.open(fileobj=stream) as tar:
        members = {each.name: tar.extractfile(each).read() for each in tar}
    assert [fault for fault in verify(corpus) if fault.file != "run.yaml"] == []
    return ledger, members


def test_images_become_raw_samples_byte_for_byte_and_losses_are_counted(folder, tmp_path):
    ledger, members = downloaded(config_of(folder), tmp_path / "corpus")
    assert [row["reason"] for row in ledger] == [
        "", "failed_to_download", "", "failed_to_resize", "", ""
    ]  # fmt: skip
    assert [row["status"] for row in ledger] == list(STATUSES)
    assert ledger[1]["error_message"] == "failed_to_download: HTTP Error 404: Not Found"
    assert [row["url"] for row in ledger] == [f"http://x.org/00000{n:04d}" for n in range(6)]
    kept = {row["key"]: number for number, row in enumerate(ledger) if row["verdict"] == "kept"}
    assert {name.partition(".")[0] for name in members} == set(kept)
    for key, number in kept.items():
        assert members[f"{key}.jpg"] == jobs.picture(number)
        assert members[f"{key}.txt"] == f"picture 00000{number:04d}".encode()
        assert json.loads(members[f"{key}.json"])["extra"] == {"key": f"00000{number:04d}"}


# --- what may be wrong with a folder ------------------------------------------------------------


def test_a_shard_that_img2dataset_has_not_finished_is_named(folder):
    shard(folder, 1)
    (folder / "00001_stats.json").unlink()
    with pytest.raises(SourceError, match=r"00001\.parquet: there is no _stats\.json.*finish 1 sh"):
        list(read_source(config_of(folder)))


def test_a_tar_that_is_gone_costs_its_images_and_no_row(folder):
    (folder / "00000.tar").unlink()
    rows = list(read_source(config_of(folder)))
    assert len(rows) == 6
    assert failures(rows) == {
        "0": "missing_image", "1": "failed_to_download", "2": "missing_image",
        "3": "failed_to_resize", "4": "missing_image", "5": "missing_image",
    }  # fmt: skip


def test_a_tar_that_was_cut_off_costs_what_stood_behind(folder):
    tar = folder / "00000.tar"
    with tarfile.open(tar) as opened:
        middle = opened.getmember("000000004.jpg").offset_data + 10
    tar.write_bytes(tar.read_bytes()[:middle])
    rows = list(read_source(config_of(folder)))
    assert failures(rows) == {
        "1": "failed_to_download", "3": "failed_to_resize", "4": "damaged_tar", "5": "damaged_tar"
    }  # fmt: skip


def test_a_header_that_lies_is_damage_and_what_stands_before_it_is_read(folder):
    tar = folder / "00000.tar"
    with tarfile.open(tar) as opened:
        start = opened.getmember("000000002.jpg").offset
    data = bytearray(tar.read_bytes())
    data[start + 124 : start + 136] = b"77777777777\0"  # eight gigabytes
    tar.write_bytes(data)
    found = failures(list(read_source(config_of(folder))))
    assert "0" not in found
    assert {found[each] for each in "245"} == {ElsewhereReason.DAMAGED_TAR}


def test_links_folders_and_twins_are_no_images(tmp_path):
    tar_path = shard(tmp_path / "images", 0, ("success",) * 4, (None,) * 4)
    with tarfile.open(tar_path, "w") as tar:
        link = tarfile.TarInfo("000000000.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "../000000001.jpg", jobs.picture(1))
        add(tar, "000000002.jpg", jobs.picture(2))
        add(tar, "000000002.png", jobs.picture(3))
        add(tar, "000000003.jpg", jobs.picture(3))
    rows = list(read_source(config_of(tmp_path / "images")))
    assert failures(rows) == dict.fromkeys("012", ElsewhereReason.MISSING_IMAGE)


def test_bytes_that_are_no_image_fail_like_any_others(folder, tmp_path):
    tar = folder / "00000.tar"
    with tarfile.open(tar) as opened:
        start = opened.getmember("000000002.jpg").offset_data
    data = bytearray(tar.read_bytes())
    data[start : start + 8] = bytes(8)
    tar.write_bytes(data)
    ledger, members = downloaded(config_of(folder), tmp_path / "corpus")
    assert (ledger[2]["verdict"], ledger[2]["reason"]) == ("failed", "not_an_image")
    assert len(members) == 9


def test_a_status_of_nobodys_is_malformed(tmp_path):
    shard(tmp_path / "images", 0, ("success", "perhaps", None), (None,) * 3)
    first, *others = read_source(config_of(tmp_path / "images"))
    assert isinstance(first.location, DownloadedImage)
    assert [(type(row), row.line) for row in others] == [(MalformedRow, 2), (MalformedRow, 3)]


def test_a_list_that_is_not_img2datasets_is_named(tmp_path):
    pq.write_table(pa.table({"url": ["http://x.org"], "caption": ["a"]}), tmp_path / "0.parquet")
    (tmp_path / "0_stats.json").write_text("{}")
    with pytest.raises(SourceError, match="no column 'key'"):
        list(read_source(config_of(tmp_path)))
