"""Small clean corpora as the selection writes them, for tests of what reads them.

Imported by tests and by the processes they start.
"""

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg

from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.tar import TarWriter

CAPTION = pa.struct(
    [
        ("text", pa.string()),
        ("origin", pa.string()),
        ("index", pa.int32()),
        ("itm", pa.float32()),
        ("itc", pa.float32()),
        ("clip", pa.float32()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
    ]
)
CLEAN_FIELDS = (
    pa.field("sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("original_width", pa.int32()),
    pa.field("original_height", pa.int32()),
    pa.field("num_captions", pa.int32()),
    pa.field("num_kept", pa.int32()),
    pa.field("captions", pa.list_(CAPTION)),
    pa.field("image_offset", pa.int64()),
    pa.field("image_bytes", pa.int64()),
    pa.field("json_offset", pa.int64()),
    pa.field("json_bytes", pa.int64()),
    pa.field("policy", pa.string()),
)


def photo(number, width=48, height=40, quality=90):
    """Return a JPEG that looks like no other: smooth shapes under fine texture."""
    rng = np.random.default_rng(number)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((3, 60), (9, 30), (27, 15)):
        coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        pixels += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels += 4 * rng.normal(size=pixels.shape).astype(np.float32)
    return simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=quality)


@dataclass(frozen=True)
class Item:
    """One row: an image, and its captions as (text, origin, is kept); no image if it failed."""

    key: str
    image: bytes | None
    captions: tuple[tuple[str, str, bool], ...]


def web_item(index, row, image):
    key = f"{index:05d}{row:04d}"
    texts = (
        (f"Web text of {key}.", "web", True),
        (f"a synthetic text of {key}", "synthetic", True),
    )
    return Item(key, image, (*texts, (f"a dropped text of {key}", "synthetic", False)))


def human_item(index, row, image, num_texts=5):
    key = f"{index:05d}{row:04d}"
    return Item(key, image, tuple((f"text {n} of {key}", "human", True) for n in range(num_texts)))


def failed_item(index, row):
    return Item(f"{index:05d}{row:04d}", None, ())


def caption_row(number, caption):
    text, origin, is_kept = caption
    row = dict.fromkeys(("itm", "itc", "clip"), 0.5)
    row |= {"text": text, "origin": origin, "index": number}
    return row | (
        {"verdict": "kept", "reason": ""}
        if is_kept
        else {"verdict": "dropped", "reason": "itm_low"}
    )


def ledger_row(source, item, spans):
    is_kept = item.image is not None and any(kept for *_, kept in item.captions)
    row = dict.fromkeys(field.name for field in CLEAN_FIELDS)
    if is_kept:
        row |= {"image_offset": spans["jpg"].offset, "image_bytes": spans["jpg"].size}
        row |= {"json_offset": spans["json"].offset, "json_bytes": spans["json"].size}
    return row | {
        "key": item.key,
        "source": source,
        "url": f"http://host/{item.key}.jpg",
        "verdict": "kept" if is_kept else "failed",
        "reason": "" if is_kept else "http_404",
        "sha256": hashlib.sha256(item.image).hexdigest() if item.image else None,
        "num_captions": len(item.captions),
        "num_kept": sum(kept for *_, kept in item.captions),
        "captions": [caption_row(n, caption) for n, caption in enumerate(item.captions)],
        "policy": "blip",
    }


def write_clean(corpus, source, index, items, *, leave_out=(), fingerprint="clean"):
    """Commit one clean shard; `leave_out` names ledger columns that it shall lack."""
    schema = ledger_schema([field for field in CLEAN_FIELDS if field.name not in leave_out])
    with corpus.writer("clean", source, index, fingerprint=fingerprint) as writer:
        with (
            open(writer.path("tar"), "wb") as stream,
            TarWriter(stream) as tar,
            LedgerWriter(writer.path("parquet"), schema) as ledger,
        ):
            for item in items:
                kept = [text for text, _, is_kept in item.captions if is_kept]
                spans = {}
                if item.image is not None and kept:
                    members = {"jpg": item.image, "txt": kept[0].encode(), "json": b"{}"}
                    spans = tar.write(item.key, members)
                row = ledger_row(source, item, spans)
                ledger.write({name: row[name] for name in schema.names})
        return writer.commit(rows_in=len(items), counts=ledger.counts)


def write_web(corpus, source, shard_sizes, make=web_item, first_photo=0):
    """Commit shards of so many images each, every fifth row a failure besides."""
    number = first_photo
    for index, size in enumerate(shard_sizes):
        items, row = [], 0
        while size:
            if row % 5 == 4:
                items.append(failed_item(index, row))
            else:
                items.append(make(index, row, photo(number)))
                number, size = number + 1, size - 1
            row += 1
        write_clean(corpus, source, index, items)


def demo_corpus(root):
    """Return a corpus of a web and a human source: 23 + 2 x 5 records."""
    corpus = Corpus(str(root))
    write_web(corpus, "web", (9, 5, 0, 7, 2))
    write_web(corpus, "coco", (2,), make=human_item, first_photo=1000)
    return corpus
