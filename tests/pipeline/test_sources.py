"""Every published form parses as published; what does not parse is counted, with its place."""

import csv
import gzip
import io
import json
import subprocess
import sys
import tarfile
import textwrap

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.sources.config import SourceConfig, SourceFormat
from pipeline.sources.rows import (
    HttpUrl,
    LocalImage,
    MalformedReason,
    MalformedRow,
    Origin,
    SourceError,
    SourceRow,
    TarMember,
    ZipMember,
)
from pipeline.sources.shards import plan_shards, read_shard, read_source

# The first lines of Train_GCC-training.tsv, as published.
CC3M = (
    "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAAAAAAM6o/"
    "_11MuAAKalQ/IMG_3422.JPG?imgmax=800\n"
    "christmas tree on a black background .\thttps://thumb1.shutterstock.com/"
    "display_pic_with_logo/261388/223876810/"
    "stock-vector-christmas-tree-on-a-black-background-vector-223876810.jpg\n"
)
CC12M = (
    'https://i.example.com/a.jpg\t<PERSON> said "cheese", and smiled\n'
    "https://i.example.com/b.jpg?w=1&h=2\tMetal Design Within Reach Ivory Slipper Chairs - a Pair\n"
)
LAION_SCHEMA = pa.schema(
    [
        ("SAMPLE_ID", pa.int64()),
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("HEIGHT", pa.int64()),
        ("WIDTH", pa.int64()),
        ("LICENSE", pa.string()),
        ("NSFW", pa.string()),
        ("similarity", pa.float64()),
    ]
)


def source(tmp_path, form, text=None, name="list", **settings_of):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return SourceConfig(name="src", format=form, **{"paths": (str(path),), **settings_of})


def rows_of(config):
    return list(read_source(config))


def good(rows):
    return [row for row in rows if isinstance(row, SourceRow)]


def bad(rows):
    return [(row.line, row.reason) for row in rows if isinstance(row, MalformedRow)]


def test_cc3m_parses_as_published(tmp_path):
    rows = rows_of(source(tmp_path, "cc3m", CC3M))
    assert rows[0] == SourceRow(
        source="src",
        location=HttpUrl(
            "http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAAAAAAM6o/_11MuAAKalQ/"
            "IMG_3422.JPG?imgmax=800"
        ),
        captions=("a very typical bus station",),
        origin=Origin.WEB,
    )
    assert rows[1].captions == ("christmas tree on a black background .",)


def test_cc12m_has_the_url_first_and_quotes_are_text(tmp_path):
    first, _ = rows_of(source(tmp_path, "cc12m", CC12M))
    assert first.url == "https://i.example.com/a.jpg"
    assert first.captions == ('<PERSON> said "cheese", and smiled',)


def laion_file(path, num_rows=3, rows_per_group=2):
    columns = {
        "SAMPLE_ID": list(range(num_rows)),
        "URL": [f"https://example.com/{n}.jpg" for n in range(num_rows)],
        "TEXT": [f"Foto número {n}" for n in range(num_rows)],
        "HEIGHT": [480] * num_rows,
        "WIDTH": [640] * num_rows,
        "LICENSE": ["?"] * num_rows,
        "NSFW": ["UNLIKELY"] * num_rows,
        "similarity": [0.33] * num_rows,
    }
    pq.write_table(pa.table(columns, schema=LAION_SCHEMA), path, row_group_size=rows_per_group)


def test_laion_400m_keeps_its_columns(tmp_path):
    laion_file(tmp_path / "part-00000.snappy.parquet")
    rows = rows_of(SourceConfig(name="laion", format="laion400m", paths=(str(tmp_path),)))
    assert [row.url for row in rows] == [f"https://example.com/{n}.jpg" for n in range(3)]
    assert rows[1].captions == ("Foto número 1",)
    assert rows[1].extra == {
        "SAMPLE_ID": 1, "HEIGHT": 480, "WIDTH": 640,
        "LICENSE": "?", "NSFW": "UNLIKELY", "similarity": 0.33,
    }  # fmt: skip


def test_sbu_parses_from_json_and_from_two_text_files(tmp_path):
    urls = ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "http://x.org/2.jpg"]
    captions = ["A wooden chair in the living room", "the view: from here"]
    document = json.dumps({"image_urls": urls, "user_ids": ["1", "2"], "captions": captions})
    from_json = rows_of(source(tmp_path, "sbu", document, name="sbu-captions-all.json"))
    pair = (tmp_path / "urls.txt", tmp_path / "captions.txt")
    for path, lines in zip(pair, (urls, captions), strict=True):
        path.write_text("\n".join(lines) + "\n")
    from_text = rows_of(
        SourceConfig(name="src", format="sbu", paths=tuple(str(path) for path in pair))
    )
    assert from_json == from_text
    assert [(row.url, *row.captions) for row in from_json] == list(zip(urls, captions, strict=True))


def test_sbu_lists_of_different_length_are_counted(tmp_path):
    document = json.dumps({"captions": ["a", "b", "c"], "image_urls": ["http://x.org/1.jpg"]})
    rows = rows_of(source(tmp_path, "sbu", document, name="s.json"))
    assert len(good(rows)) == 1
    assert [reason for _, reason in bad(rows)] == [MalformedReason.UNMATCHED] * 2


COCO = {
    "info": {"year": 2014},
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A man with a red helmet. "},
        {"image_id": 57, "id": 2, "caption": "A dog."},
        {"image_id": 9, "id": 3, "caption": "Man riding a motor bike\n"},
        {"image_id": 404, "id": 4, "caption": "Nobody's image"},
        {"image_id": 57, "id": 5, "caption": 7},
    ],
    "images": [
        {
            "id": 57, "file_name": "COCO_val2014_57.jpg", "width": 640, "height": 480,
            "coco_url": "http://images.cocodataset.org/val2014/COCO_val2014_57.jpg",
        },
        {"id": 9, "file_name": "COCO_val2014_9.jpg"},
    ],
}  # fmt: skip


def test_coco_gives_one_row_per_image_with_all_its_captions(tmp_path):
    rows = rows_of(source(tmp_path, "coco", json.dumps(COCO), name="captions_val2014.json"))
    dog, man = good(rows)
    assert dog.url == "http://images.cocodataset.org/val2014/COCO_val2014_57.jpg"
    assert dog.origin is Origin.HUMAN
    assert dog.extra == {"id": 57, "width": 640, "height": 480}
    assert man.captions == ("A man with a red helmet.", "Man riding a motor bike")
    assert man.url == "http://images.cocodataset.org/COCO_val2014_9.jpg"
    assert sorted(reason for _, reason in bad(rows)) == ["unmatched", "wrong_type"]


def test_coco_images_on_disk_and_in_zips_need_no_http(tmp_path):
    text = json.dumps(COCO)
    on_disk = good(rows_of(source(tmp_path, "coco", text, image_root="/data/val2014")))
    assert on_disk[0].location == LocalImage("/data/val2014/COCO_val2014_57.jpg")
    in_zip = good(rows_of(source(tmp_path, "coco", text, image_root="/data/val2014.zip")))
    assert in_zip[0].location == ZipMember("/data/val2014.zip", "COCO_val2014_57.jpg")


def test_karpathy_coco_gives_one_row_per_image(tmp_path):
    document = {
        "images": [
            {
                "filepath": "val2014", "filename": "COCO_val2014_391895.jpg", "imgid": 0,
                "sentids": [770337], "split": "test", "cocoid": 391895,
                "sentences": [{"tokens": ["a"], "raw": "A man.", "imgid": 0, "sentid": 770337}],
            }
        ],
        "dataset": "coco",
    }  # fmt: skip
    (row,) = rows_of(source(tmp_path, "coco", json.dumps(document), name="dataset_coco.json"))
    assert row.url == "http://images.cocodataset.org/val2014/COCO_val2014_391895.jpg"
    assert row.captions == ("A man.",)
    assert row.extra == {"cocoid": 391895, "imgid": 0, "split": "test"}


def test_visual_genome_takes_its_urls_from_image_data(tmp_path):
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 1, "url": url}]))
    regions = [
        {"id": 1, "regions": [{"region_id": 1382, "phrase": "the clock is green in colour"}]},
        {"id": 2, "regions": []},
    ]
    settings_of = {"image_data": str(tmp_path / "image_data.json")}
    text = json.dumps(regions)
    rows = rows_of(source(tmp_path, "visual_genome", text, **settings_of))
    assert (rows[0].url, rows[0].captions) == (url, ("the clock is green in colour",))
    assert [reason for _, reason in bad(rows)] == [MalformedReason.UNMATCHED]
    local = source(tmp_path, "visual_genome", text, image_root="/vg", **settings_of)
    assert rows_of(local)[0].location == LocalImage("/vg/VG_100K_2/1.jpg")


TABLES = {
    "t.csv": 'id,url,caption\n1,http://x.org/1.jpg,"one, two\nlines"\n2,http://x.org/2.jpg,b\n',
    "t.tsv": "url\tid\tcaption\nhttp://x.org/1.jpg\t1\tone, two\nhttp://x.org/2.jpg\t2\tb\n",
    "t.jsonl": '{"url": "http://x.org/1.jpg", "caption": ["one, two", "also"], "id": 1}\n\n'
    '{"url": "http://x.org/2.jpg", "caption": "b", "id": 2}\n',
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TABLES)
def test_any_table_reads_plain_or_compressed(tmp_path, name, compression):
    data = TABLES[name].encode()
    if compression == ".gz":
        data = gzip.compress(data)
    elif compression == ".zst":
        data = zstandard.compress(data)
    config = source(tmp_path, "table", data, name=name + compression, extra_columns=("id",))
    first, second = rows_of(config)
    assert first.captions[0].startswith("one, two")
    assert (second.url, second.captions) == ("http://x.org/2.jpg", ("b",))
    assert str(second.extra["id"]) == "2"


def test_a_memory_url_a_folder_and_a_glob_all_lead_to_files(tmp_path):
    with fsspec.open("memory://lists/a.tsv", "w") as stream:
        stream.write(TABLES["t.tsv"])
    for name in ("b.tsv", "a.tsv", "notes.md"):
        (tmp_path / name).write_text(TABLES["t.tsv"])
    for paths, num_rows in (
        (("memory://lists/a.tsv",), 2), ((str(tmp_path),), 4), ((str(tmp_path / "*.tsv"),), 4),
    ):  # fmt: skip
        config = SourceConfig(name="src", format="table", paths=paths)
        assert len(good(rows_of(config))) == num_rows


def test_relative_urls_are_joined_to_the_base(tmp_path):
    config = source(
        tmp_path, "table", "url,caption\na/1.jpg,x\nhttp://o.org/2.jpg,y\n", name="t.csv",
        base_url="https://host.org/list/",
    )  # fmt: skip
    assert [r.url for r in rows_of(config)] == [
        "https://host.org/list/a/1.jpg",
        "http://o.org/2.jpg",
    ]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "file:///x", "a/../../b.jpg"])
def test_a_list_cannot_name_images_outside_the_image_root(tmp_path, name):
    config = source(
        tmp_path, "table", f"url\tcaption\n{name}\tx\n", name="t.tsv", image_root=str(tmp_path)
    )
    assert bad(rows_of(config)) == [(2, MalformedReason.UNSAFE_PATH)]


def test_a_file_url_in_a_list_stays_a_url_for_the_guard_to_refuse(tmp_path):
    rows = rows_of(source(tmp_path, "cc3m", "passwords\tfile:///etc/passwd\n"))
    assert rows[0].location == HttpUrl("file:///etc/passwd")


def test_malicious_cells_are_counted_with_their_line(tmp_path):
    lines = [
        b"fine\thttp://x.org/1.jpg",
        b"x" * 10_000_000 + b"\thttp://x.org/2.jpg",
        b"nul \0 here\thttp://x.org/3.jpg",
        b"caf\xe9\thttp://x.org/4.jpg",
        b"no url",
        b"one\ttwo\tthree",
        b"no url either\t",
        b"long\thttp://x.org/" + b"a" * 9000,
        b"y" * 20_000_000,
        "ça va, \u2028still one line\thttp://x.org/10.jpg".encode(),
        b"\xed\xa0\x80 half a pair\thttp://x.org/11.jpg",
    ]
    rows = rows_of(source(tmp_path, "cc3m", b"\r\n".join(lines)))
    assert [row.url for row in good(rows)] == ["http://x.org/1.jpg", "http://x.org/10.jpg"]
    assert bad(rows) == [
        (2, MalformedReason.CAPTION_TOO_LONG),
        (3, MalformedReason.NUL_CHARACTER),
        (4, MalformedReason.NOT_UTF8),
        (5, MalformedReason.TOO_FEW_COLUMNS),
        (6, MalformedReason.TOO_MANY_COLUMNS),
        (7, MalformedReason.MISSING_URL),
        (8, MalformedReason.URL_TOO_LONG),
        (9, MalformedReason.RECORD_TOO_LONG),
        (11, MalformedReason.NOT_UTF8),
    ]


def test_malicious_jsonl_is_counted_with_its_line(tmp_path):
    lines = [
        '{"url": "http://x.org/1.jpg", "caption": "\\ud800 half a pair"}',
        '{"url": 7, "caption": "x"}',
        '{"url": "http://x.org/3.jpg", "caption": {"a": 1}}',
        "[" * 100_000,
        "9" * 5000,
        '{"URL": "http://x.org/6.jpg"}',
        '{"url": "http://x.org/7.jpg"',
        '{"url": "http://x.org/8.jpg"}',
    ]
    rows = rows_of(source(tmp_path, "table", "\n".join(lines), name="t.jsonl"))
    assert [row.captions for row in good(rows)] == [()]
    assert [reason for _, reason in bad(rows)] == [
        "not_utf8", "wrong_type", "wrong_type", "broken_record", "broken_record", "missing_url",
        "broken_record",
    ]  # fmt: skip
    (missing,) = [row for row in rows if isinstance(row, MalformedRow) and row.line == 6]
    assert "did you mean 'URL'" in missing.detail


def test_malicious_parquet_cells_are_counted_with_their_row(tmp_path):
    urls = [b"http://x.org/1.jpg", b"http://x.org/\xff.jpg", None, b"http://x.org/4.jpg"]
    captions = [b"fine", b"x", b"y", b"z" * 10_000_000]
    binary = pa.table({"url": urls, "caption": captions}, schema=pa.schema(
        [("url", pa.binary()), ("caption", pa.binary())]))  # fmt: skip
    arrays = [
        pa.Array.from_buffers(pa.string(), 4, column.chunk(0).buffers())
        for column in binary.columns
    ]
    pq.write_table(pa.table(arrays, names=["url", "caption"]), tmp_path / "t.parquet")
    rows = rows_of(source(tmp_path, "table", name="t.parquet"))
    assert [row.url for row in good(rows)] == ["http://x.org/1.jpg"]
    assert bad(rows) == [
        (2, MalformedReason.NOT_UTF8),
        (3, MalformedReason.MISSING_URL),
        (4, MalformedReason.CAPTION_TOO_LONG),
    ]


def test_an_unclosed_quote_costs_one_line(tmp_path):
    text = 'url,caption\nhttp://x.org/1.jpg,"open\n' + "".join(
        f"http://x.org/{n}.jpg,c\n" for n in range(2, 300)
    )
    rows = rows_of(source(tmp_path, "table", text, name="t.csv"))
    assert bad(rows) == [(2, MalformedReason.BROKEN_RECORD)]
    assert len(good(rows)) == 298


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_a_missing_column_is_named_with_its_file_and_the_nearest_name(tmp_path, name):
    if name == "t.parquet":
        pq.write_table(pa.table({"URL": ["a"], "caption": ["b"]}), tmp_path / name)
        config = source(tmp_path, "table", name=name)
    else:
        comma = "," if name == "t.csv" else "\t"
        config = source(tmp_path, "table", f"URL{comma}caption\na{comma}b\n", name=name)
    with pytest.raises(SourceError, match=rf"{name}: no column 'url'; did you mean 'URL'\?"):
        rows_of(config)


def test_a_column_of_the_wrong_type_is_an_error_and_not_a_million_malformed_rows(tmp_path):
    pq.write_table(pa.table({"url": [1, 2], "caption": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="column 'url' is int64, not text"):
        rows_of(source(tmp_path, "table", name="t.parquet"))


def test_a_file_that_was_cut_off_says_so(tmp_path):
    noise = "".join(f"{n * 7919 % 99991}\thttp://x.org/{n}.jpg\n" for n in range(9999))
    cut = gzip.compress(noise.encode())[:-2000]
    with pytest.raises(SourceError, match=r"l\.tsv\.gz: damaged or cut off"):
        rows_of(source(tmp_path, "cc3m", cut, name="l.tsv.gz"))
    with pytest.raises(SourceError, match="not readable as JSON"):
        rows_of(source(tmp_path, "coco", json.dumps(COCO)[:-30], name="c.json"))
    laion_file(tmp_path / "l.parquet")
    (tmp_path / "l.parquet").write_bytes((tmp_path / "l.parquet").read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"l\.parquet: no readable Parquet"):
        rows_of(source(tmp_path, "laion400m", name="l.parquet"))
    with pytest.raises(SourceError, match="no such file"):
        rows_of(source(tmp_path, "cc3m", name="absent.tsv"))


def test_a_config_that_cannot_work_is_refused():
    with pytest.raises(ValidationError, match="image_data"):
        SourceConfig(name="vg", format="visual_genome", paths=("x.json",))
    with pytest.raises(ValidationError, match="column_names lacks url"):
        SourceConfig(name="t", format="table", paths=("x",), column_names=("caption",))
    with pytest.raises(ValidationError, match="extra_forbidden|Extra inputs"):
        SourceConfig(name="t", format="table", paths=("x",), url_colum="u")


@pytest.mark.parametrize("form", list(SourceFormat))
def test_a_resolved_config_reads_back_as_itself(form):
    config = SourceConfig(name="s", format=form, paths=("x.json",), image_data="image_data.json")
    assert SourceConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.origin is (Origin.HUMAN if form in ("coco", "visual_genome") else Origin.WEB)


def test_a_folder_of_images_is_a_source(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jpg").write_bytes(b"jpeg")
    (tmp_path / "b.txt").write_text(" a caption\n")
    (tmp_path / "sub" / "a.PNG").write_bytes(b"png")
    rows = rows_of(SourceConfig(name="src", format="folder", paths=(str(tmp_path),)))
    assert [row.location for row in rows] == [
        LocalImage(f"{tmp_path}/b.jpg"),
        LocalImage(f"{tmp_path}/sub/a.PNG"),
    ]
    assert [row.captions for row in rows] == [("a caption",), ()]


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_webdataset_tar_is_a_source_and_its_images_are_found_by_offset(tmp_path):
    tar_of(
        tmp_path / "00000.tar",
        [
            ("000/a.jpg", b"jpeg a"), ("000/a.txt", b"caption a"), ("000/a.json", b'{"id": 5}'),
            ("b.json", b'{"caption": "caption b"}'), ("b.png", b"png b"),
            ("c.txt", b"no image"), ("d." + "x" * 200 + ".txt", b""), ("e.jpg", b"jpeg e"),
        ],
    )  # fmt: skip
    rows = rows_of(
        SourceConfig(name="src", format="webdataset", paths=(str(tmp_path),), extra_columns=("id",))
    )
    assert bad(rows) == [(3, MalformedReason.MISSING_URL), (4, MalformedReason.MISSING_URL)]
    assert [row.captions for row in good(rows)] == [("caption a",), ("caption b",), ()]
    assert good(rows)[0].extra == {"id": 5}
    data = (tmp_path / "00000.tar").read_bytes()
    for row, image in zip(good(rows), (b"jpeg a", b"png b", b"jpeg e"), strict=True):
        assert isinstance(row.location, TarMember)
        start = row.location.byte_offset
        assert data[start : start + row.location.num_bytes] == image


def test_a_damaged_tar_is_an_error_and_not_an_early_end(tmp_path):
    tar_of(tmp_path / "t.tar", [(f"{n}.jpg", b"x" * 600) for n in range(5)])
    data = bytearray((tmp_path / "t.tar").read_bytes())
    data[2 * 1536] ^= 0xFF  # the third header
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(SourceError, match=r"t\.tar: damaged at byte 3072"):
        rows_of(source(tmp_path, "webdataset", name="t.tar"))


def every_format(tmp_path, num_records):
    """One source of each form, `num_records` each, every seventh malformed where lines can be."""
    numbers = range(num_records)
    is_bad = [n % 7 == 3 for n in numbers]
    urls = [f"http://x.org/{n}.jpg" for n in numbers]
    captions = [
        "bad \0" if wrong else f"caption {n}" for n, wrong in zip(numbers, is_bad, strict=True)
    ]
    pairs = list(zip(urls, captions, strict=True))
    files = {
        "cc3m": "".join(f"{caption}\t{url}\n" for url, caption in pairs),
        "cc12m": "\n\n".join(f"{url}\t{caption}" for url, caption in pairs),
        "t.csv": "url,caption\n" + "".join(f'{url},"{text}\nmore"\n' for url, text in pairs),
        "t.jsonl": "\n".join(json.dumps({"url": u, "caption": c}) for u, c in pairs),
        "sbu": json.dumps({"image_urls": urls, "captions": captions}),
        "coco": json.dumps({"images": [
            {"filename": f"{n}.jpg", "sentences": [{"raw": captions[n]}]} for n in numbers
        ]}),
        "visual_genome": json.dumps(
            [{"id": n, "regions": [{"phrase": captions[n]}]} for n in numbers]
        ),
    }  # fmt: skip
    packed = gzip.compress(b"\xef\xbb\xbf" + files["t.csv"].encode())
    yield source(tmp_path, "table", packed, name="p.csv.gz")
    yield source(tmp_path, "cc3m", zstandard.compress(files["cc3m"].encode()), name="p.tsv.zst")
    for name, text in files.items():
        suffix = ".json" if name in ("sbu", "coco", "visual_genome") else ""
        more = {"image_root": "/vg"} if name == "visual_genome" else {}
        form = "table" if name.startswith("t.") else name
        yield source(tmp_path, form, text, name=name + suffix, **more)
    laion_file(tmp_path / "l.parquet", num_records, rows_per_group=5)
    yield source(tmp_path, "laion400m", name="l.parquet")
    tar_of(tmp_path / "w.tar", [
        member for n in numbers
        for member in ((f"{n:04}.jpg", b"j"), (f"{n:04}.txt", captions[n].encode()))
    ])  # fmt: skip
    yield source(tmp_path, "webdataset", name="w.tar")
    for n in numbers:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{n:04}.jpg").write_bytes(b"j")
    if num_records:
        yield source(tmp_path, "folder", name="images")


def test_shards_of_any_size_hold_the_same_rows_in_every_format(tmp_path):
    num_records = 23
    for config in every_format(tmp_path, num_records):
        whole = rows_of(config)
        assert len(whole) == num_records, config.format
        for size in (1, 4, 5, 23, 100):
            shards = list(plan_shards(config, records_per_shard=size))
            assert [shard.num_records for shard in shards[:-1]] == [size] * (len(shards) - 1)
            assert [shard.index for shard in shards] == list(range(len(shards)))
            by_shard = [list(read_shard(config, shard)) for shard in reversed(shards)]
            assert [row for rows in reversed(by_shard) for row in rows] == whole, config.format


def test_one_in_so_many_records_is_read_evenly_in_every_format(tmp_path):
    num_records = 23
    for config in every_format(tmp_path, num_records):
        whole = rows_of(config)
        for one_in in (2, 5, 23, 1000):
            thinned = config.model_copy(update={"one_in": one_in})
            for size in (1, 3, 100):
                shards = list(plan_shards(thinned, records_per_shard=size))
                rows = [list(read_shard(thinned, shard)) for shard in shards]
                assert [len(each) for each in rows] == [shard.num_records for shard in shards]
                assert {len(each) for each in rows[:-1]} <= {size}
                assert [row for each in rows for row in each] == whole[::one_in], config.format
            assert rows_of(thinned) == whole[::one_in]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    one_in=st.integers(1, 12),
    records_per_shard=st.integers(1, 5),
)
@settings(max_examples=50)
def test_one_in_so_many_counts_on_from_file_to_file(
    tmp_path_factory, sizes, one_in, records_per_shard
):
    folder = tmp_path_factory.mktemp("lists")
    for number, size in enumerate(sizes):
        lines = [json.dumps({"url": f"http://x.org/{number}/{n}"}) for n in range(size)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    config = SourceConfig(name="src", format="table", paths=(str(folder),))
    thinned = config.model_copy(update={"one_in": one_in})
    shards = list(plan_shards(thinned, records_per_shard=records_per_shard))
    rows = [row for shard in shards for row in read_shard(thinned, shard)]
    assert rows == rows_of(config)[::one_in]
    assert sum(shard.num_records for shard in shards) == -(-sum(sizes) // one_in)


def test_one_in_so_many_belongs_to_the_content_and_whole_lists_keep_their_name(tmp_path):
    config = source(tmp_path, "cc3m", CC3M)
    assert "one_in" not in config.content()
    assert config.model_copy(update={"one_in": 10}).content() == config.content() | {"one_in": 10}


def test_shards_span_files(tmp_path):
    for name, num in (("a.jsonl", 3), ("b.jsonl", 1), ("c.jsonl", 4)):
        lines = [json.dumps({"url": f"http://x.org/{name}/{n}"}) for n in range(num)]
        (tmp_path / name).write_text("\n".join(lines))
    config = SourceConfig(name="src", format="table", paths=(str(tmp_path),))
    shards = list(plan_shards(config, records_per_shard=5))
    assert [len(shard.pieces) for shard in shards] == [3, 1]
    assert [row for shard in shards for row in read_shard(config, shard)] == rows_of(config)


def test_a_file_that_shrank_since_it_was_planned_is_an_error(tmp_path):
    config = source(tmp_path, "cc3m", CC3M)
    (shard,) = plan_shards(config, records_per_shard=10)
    (tmp_path / "list").write_text(CC3M.splitlines()[0])
    with pytest.raises(SourceError, match="1 of 2 records found.*changed since shard 0"):
        list(read_shard(config, shard))


def test_a_late_parquet_shard_reads_only_the_row_groups_it_touches(tmp_path):
    laion_file(tmp_path / "l.parquet", num_rows=40, rows_per_group=10)
    data = bytearray((tmp_path / "l.parquet").read_bytes())
    meta = pq.read_metadata(tmp_path / "l.parquet")
    first_group_end = meta.row_group(1).column(0).dictionary_page_offset
    data[4:first_group_end] = bytes(first_group_end - 4)  # nobody may read this
    (tmp_path / "l.parquet").write_bytes(data)
    config = source(tmp_path, "laion400m", name="l.parquet")
    *_, last = plan_shards(config, records_per_shard=10)
    assert [row.extra["SAMPLE_ID"] for row in read_shard(config, last)] == list(range(30, 40))
    with pytest.raises(SourceError):
        rows_of(config)


records = st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"\t")), max_size=20)


@settings(max_examples=150, deadline=None)
@given(records)
def test_unquoted_lines_in_are_rows_out_plus_malformed(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("lines")
    rows = rows_of(source(folder, "cc12m", b"#\n" + b"\n".join(lines)))
    assert len(rows) == 1 + sum(1 for line in lines if line.removesuffix(b"\r"))
    for row in good(rows):
        "".join((row.url, *row.captions)).encode()  # no lone surrogate left


csv_texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(csv_texts, csv_texts), max_size=15))
def test_written_csv_comes_back_row_for_row(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("csv")
    with open(folder / "t.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerows([("url", "caption"), *pairs])
    rows = rows_of(source(folder, "table", name="t.csv"))
    for row, (url, caption) in zip(rows, pairs, strict=True):
        if "\0" in url + caption or not url.strip():
            assert isinstance(row, MalformedRow)
        else:
            assert (row.url, row.captions) == (url.strip(), tuple(filter(None, [caption.strip()])))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["url", "caption", "image_id", "id", "regions", "phrase", "sentences"]),
        inner, max_size=4),
    max_leaves=8), max_size=8))  # fmt: skip
def test_json_items_in_are_rows_out_plus_malformed(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("json")
    lines = "\n".join(json.dumps(item) for item in items)
    assert len(rows_of(source(folder, "table", lines, name="t.jsonl"))) == len(items)
    document = json.dumps(items, indent=1)
    genome = source(folder, "visual_genome", document, name="v.json", image_root="/x")
    assert len(rows_of(genome)) == len(items)
    sbu = source(folder, "sbu", json.dumps({"captions": items, "image_urls": items}), name="s.json")
    assert len(rows_of(sbu)) == len(items)
    karpathy = json.dumps({"images": [{"sentences": [], "filename": "1.jpg"}, *items]})
    assert len(rows_of(source(folder, "coco", karpathy, name="c.json"))) == len(items) + 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=6),
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["a", "b", 7, ""])), max_size=12),
)
def test_coco_captions_in_are_captions_out_plus_malformed(tmp_path_factory, image_ids, pairs):
    annotations = [{"image_id": image_id, "caption": caption} for image_id, caption in pairs]
    images = [{"id": image_id, "file_name": "x.jpg"} for image_id in image_ids]
    document = json.dumps({"annotations": annotations, "images": images})
    folder = tmp_path_factory.mktemp("coco")
    rows = rows_of(source(folder, "coco", document, name="c.json"))
    num_twice = len(image_ids) - len(set(image_ids))
    assert len(good(rows)) + num_twice == len(image_ids)
    num_captions = sum(len(row.captions) for row in good(rows))
    assert num_captions + len(bad(rows)) - num_twice == len(annotations)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.binary(max_size=30), max_size=30), st.integers(1, 7))
def test_parquet_rows_in_are_rows_out_plus_malformed(tmp_path_factory, cells, rows_per_group):
    folder = tmp_path_factory.mktemp("parquet")
    table = pa.table({"url": pa.array(cells, pa.binary()), "caption": pa.array(cells, pa.binary())})
    pq.write_table(table, folder / "t.parquet", row_group_size=rows_per_group)
    config = source(folder, "table", name="t.parquet")
    rows = rows_of(config)
    assert len(rows) == len(cells)
    shards = plan_shards(config, records_per_shard=4)
    assert [row for shard in shards for row in read_shard(config, shard)] == rows


LISTING = """
import re, sys
from pathlib import Path
from pipeline.sources.config import SourceConfig
from pipeline.sources.shards import plan_shards, read_shard

config = SourceConfig.model_validate_json(sys.argv[1])

def peak_kib():  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak_kib()
num_rows = sum(1 for shard in plan_shards(config, records_per_shard=10_000)
               for _ in read_shard(config, shard))
print(num_rows, peak_kib() - before)
"""


def listing_growth_mib(config):
    """Rows listed, and by how many MiB a fresh process grew while it listed them."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LISTING), config.model_dump_json()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    num_rows, growth_kib = map(int, run.stdout.split())
    return num_rows, growth_kib / 1024


def test_listing_takes_constant_memory(tmp_path, capsys):
    num_rows = 100_000
    line = "a caption of the usual length, ten words or so\thttp://host-{}.example.com/image.jpg\n"
    with open(tmp_path / "big.tsv", "w") as stream:
        stream.writelines(line.format(n) for n in range(num_rows))
    region = {"phrase": "the clock is green in colour", "x": 421, "y": 57, "width": 82}
    with open(tmp_path / "vg.json", "w") as stream:
        items = (json.dumps({"id": n, "regions": [region] * 50}) for n in range(10_000))
        stream.write("[")
        for number, item in enumerate(items):
            stream.write(("," if number else "") + item)
        stream.write("]")
    laion_file(tmp_path / "l.parquet", num_rows, rows_per_group=25_000)
    for config, expected in (
        (source(tmp_path, "cc3m", name="big.tsv"), num_rows),
        (source(tmp_path, "laion400m", name="l.parquet"), num_rows),
        (source(tmp_path, "visual_genome", name="vg.json", image_root="/vg"), 10_000),
    ):
        found, growth_mib = listing_growth_mib(config)
        size_mib = (tmp_path / config.paths[0]).stat().st_size / 2**20
        with capsys.disabled():
            sys.stdout.write(
                f"\n{config.format}: {found} rows of {size_mib:.0f} MiB: "
                f"peak RSS grew {growth_mib:.0f} MiB\n"
            )
        assert found == expected
        assert growth_mib < 100, config.format  # what libraries hold, whatever the size
