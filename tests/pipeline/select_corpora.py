"""Raw shards and sidecars to select from, written as the stages before write them, without models.

Imported by tests, by the processes they kill and by the benchmark, so it stays light.
"""

import hashlib
import json
import tarfile

import pyarrow.parquet as pq

from pipeline.download_row import RAW_SCHEMA
from pipeline.ledger import LedgerWriter
from pipeline.score_rows import CAPTIONS_SCHEMA
from pipeline.tar import TarWriter

SOURCE = "web"


def image_of(key):
    return b"\xff\xd8\xff" + hashlib.sha256(key.encode()).digest() * (3 + len(key) % 5)


def raw_row(key, *, verdict="kept", reason="", source=SOURCE, extra=None, **columns):
    row = dict.fromkeys(RAW_SCHEMA.names)
    row |= {
        "key": key,
        "source": source,
        "url": f"http://host/{key}.jpg",
        "verdict": verdict,
        "reason": reason,
        "status": "success" if verdict == "kept" else "failed_to_download",
        "error_message": reason or None,
        "origin": "web",
        "attempts": 2,
        "http_status": 200 if verdict == "kept" else 404,
        "extra": None if extra is None else json.dumps(extra),
    }
    if verdict == "kept":
        row |= {
            "sha256": hashlib.sha256(image_of(key)).hexdigest(),
            "num_bytes": 4321,
            "width": 256,
            "height": 192,
            "original_width": 800,
            "original_height": 600,
            "phash": "0123456789abcdef",
        }
    return row | columns


def caption(text, origin="web", index=0, *, itm=None, itc=None, clip=None, **columns):
    """A caption of an image, to be given its key by `commit`."""
    is_synthetic = origin == "synthetic"
    row = dict.fromkeys(CAPTIONS_SCHEMA.names)
    return row | {
        "verdict": "kept",
        "reason": "",
        "origin": origin,
        "index": index,
        "text": text,
        "num_tokens": 7 if is_synthetic else None,
        "seed": 3 if is_synthetic else None,
        "itm": itm,
        "itc": itc,
        "clip": clip,
        "captioner": "c" * 16 if is_synthetic else None,
        "filter": "f" * 16 if itm is not None else None,
        "clip_model": "d" * 16 if clip is not None else None,
        **columns,
    }


def web(text, **scores):
    return caption(text, "web", **scores)


def synthetic(text, index=0, **scores):
    return caption(text, "synthetic", index, **scores)


def human(text, index=0, **scores):
    return caption(text, "human", index, **scores)


def lost(verdict="failed", reason="bad_image"):
    row = dict.fromkeys(CAPTIONS_SCHEMA.names)
    return row | {"verdict": verdict, "reason": reason}


def commit(corpus, images, *, source=SOURCE, index=0, replace=None, stats=None):
    """Commit a raw shard and its sidecar; `images` are pairs of a raw row and its sidecar rows."""
    raw = commit_raw(corpus, [row for row, _ in images], source=source, index=index)
    return raw, commit_captions(corpus, raw, images, replace=replace, stats=stats)


def commit_raw(corpus, rows, *, source=SOURCE, index=0, replace=None):
    with corpus.writer("raw", source, index, fingerprint="r" * 16, replace=replace) as writer:
        with open(writer.path("tar"), "wb") as stream, TarWriter(stream) as tar:
            for row in rows:
                if row["verdict"] == "kept":
                    members = {
                        "jpg": image_of(row["key"]),
                        "json": b'{"caption":"?"}',
                        "txt": b"?",
                    }
                    tar.write(row["key"], members)
        with LedgerWriter(writer.path("parquet"), RAW_SCHEMA, 1000) as ledger:
            for row in rows:
                ledger.write(row)
        return writer.commit(rows_in=ledger.num_rows, counts=ledger.counts)


def commit_captions(corpus, raw, images, *, replace=None, stats=None):
    with corpus.writer(
        "captions",
        raw.source,
        raw.index,
        fingerprint="s" * 16,
        inputs=raw.sha256,
        replace=replace,
    ) as writer:
        with LedgerWriter(writer.path("parquet"), CAPTIONS_SCHEMA) as ledger:
            for row, captions in images:
                for each in captions:
                    ledger.write(each | {name: row[name] for name in ("key", "source", "url")})
        return writer.commit(rows_in=ledger.num_rows, counts=ledger.counts, stats=stats)


# What was selected


def ledger_of(corpus, record):
    with corpus.open(record, "parquet") as stream:
        return pq.read_table(stream).to_pylist()


def samples_of(corpus, record):
    found = {}
    with corpus.open(record, "tar") as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def kept_of(row):
    return [each["text"] for each in row["captions"] if each["verdict"] == "kept"]


def reasons_of(row):
    return {each["text"]: each["reason"] for each in row["captions"] if each["reason"]}
