"""Small corpora to report on: real committed shards, from plain rows."""

import io
import json
import random

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.corpus import Corpus
from pipeline.download_row import RAW_SCHEMA
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.score_rows import CAPTIONS_SCHEMA
from pipeline.tar import TarWriter

_CAPTION = pa.struct(
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
CLEAN_SCHEMA = ledger_schema(
    [
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_captions", pa.int32()),
        pa.field("num_kept", pa.int32()),
        pa.field("captions", pa.list_(_CAPTION)),
        pa.field("image_offset", pa.int64()),
        pa.field("image_bytes", pa.int64()),
        pa.field("policy", pa.string()),
    ]
)
SCHEMAS = {"raw": RAW_SCHEMA, "captions": CAPTIONS_SCHEMA, "clean": CLEAN_SCHEMA}
CONTENT = {
    "raw": {"download": {"image_size_px": 384}},
    "captions": {"captioner": {"name": "example/captioner"}, "scorer": {"dtype": "float32"}},
    "clean": {"select": {"policy": "blip", "itm_threshold": 0.5}},
}
HOSTILE = [
    "<script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 1">',
    "</script><script>window.pwned = 1</script>",
    "</title></style></textarea><svg onload=window.pwned=1>",
    "{{ 7 * 7 }} {% include '/etc/passwd' %} ${window.pwned = 1}",
    "javascript:window.pwned=1 data:text/html,<script>window.pwned=1</script>",
    "a cat \u202egnp.exe\u202c \u2066isolated\u2069 \u200eleft\u200f",
    "nul \x00 bell \x07 escape \x1b[31mred delete \x7f csi \x9b",
    "line\u2028separator\u2029paragraph\nbreak\ttab\r",
    "<!-- comment --> ]]> &lt;b&gt; &#x3c;i&#x3e; &amp;",
    "' onmouseover='window.pwned=1' style='position:fixed;inset:0",
    "zalgo " + "h\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308\u0309" * 5,
    "x" * 3000,
]


def drawing(seed):
    """Return a small JPEG of a coloured shape."""
    chance = random.Random(seed)
    width, height = chance.choice([(384, 256), (256, 384), (320, 320), (384, 150)])
    colour = lambda: tuple(chance.randrange(40, 230) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", (width, height), colour())
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, side = chance.randrange(width), chance.randrange(height), chance.randrange(30, 140)
        shape = chance.choice([pen.ellipse, pen.rectangle])
        shape((x, y, x + side, y + side), fill=colour())
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def commit(corpus, place, rows, *, images=None, **options):
    """Commit the shard (stage, source, index) with these rows, and a tar of images by key."""
    stage = place[0]
    schema = SCHEMAS[stage]
    with corpus.writer(*place, fingerprint="0123456789abcdef", **options) as writer:
        with LedgerWriter(writer.path("parquet"), schema) as ledger:
            spans = {}
            if images is not None:
                with open(writer.path("tar"), "wb") as stream, TarWriter(stream) as tar:
                    for key in sorted(images):
                        members = {"jpg": images[key], "json": b"{}", "txt": b"x"}
                        spans[key] = tar.write(key, members)["jpg"]
            for row in rows:
                full = {**dict.fromkeys(schema.names), **row}
                if stage == "clean" and full["key"] in spans:
                    span = spans[full["key"]]
                    full |= {"image_offset": span.offset, "image_bytes": span.size}
                ledger.write(full)
        return writer.commit(
            rows_in=ledger.num_rows, counts=ledger.counts, stats={"content": CONTENT[stage]}
        )


SUBJECTS = ["red bus", "white cat", "bowl of soup", "tall tower", "dog on a beach", "wooden chair"]
PLACES = ["in the rain", "at night", "on a table", "near a river", "in black and white", ""]
ALT = [
    "IMG_2041.jpg",
    "click to enlarge",
    "Кошка на окне",
    "赤いバス",
    "contact me@example.org",
    "",
]
REASONS = [
    ("failed", "http_404"),
    ("failed", "timeout"),
    ("failed", "not_an_image"),
    ("dropped", "robots_header"),
    ("dropped", "image_too_small"),
]


class Maker:
    """Makes plausible rows of all three stages."""

    def __init__(self, seed=0, texts=()):
        self.random = random.Random(seed)
        self.texts = list(texts)

    def caption(self):
        chance = self.random
        if self.texts and chance.random() < 0.3:
            return chance.choice(self.texts)
        if chance.random() < 0.15:
            return chance.choice(ALT)
        return f"a {chance.choice(SUBJECTS)} {chance.choice(PLACES)}".strip()

    def raw_row(self, source, key, origin):
        chance = self.random
        host = chance.choice(["img.example.org", "cdn.example.com:8080", "user@Photos.Example.net"])
        row = {
            "key": key,
            "source": source,
            "url": f"https://{host}/{source}/{key}.{chance.choice(['jpg', 'png', 'webp?x=1'])}",
            "verdict": "kept",
            "reason": "",
            "caption": self.caption(),
            "num_captions": 1,
            "origin": origin,
            "status": "success",
            "http_status": 200,
            "attempts": chance.choice([1, 1, 1, 2, 3]),
        }
        if chance.random() < 0.2:
            verdict, reason = chance.choice(REASONS)
            status = {"http_404": 404, "timeout": None}.get(reason, 200)
            return row | {"verdict": verdict, "reason": reason, "http_status": status}
        width, height = chance.randrange(200, 2000), chance.randrange(200, 2000)
        return row | {
            "num_bytes": chance.randrange(3_000, 600_000),
            "sha256": f"{chance.randrange(300):064x}"
            if chance.random() < 0.1
            else f"{chance.getrandbits(256):064x}",
            "phash": f"{chance.randrange(20):016x}"
            if chance.random() < 0.1
            else f"{chance.getrandbits(64):016x}",
            "width": 384,
            "height": 256,
            "original_width": width,
            "original_height": height,
            "final_url": "https://elsewhere.example/" if chance.random() < 0.1 else None,
            "extra": json.dumps({"license": chance.choice(["CC-BY", "CC0 <b>"])})
            if chance.random() < 0.3
            else None,
        }

    def caption_rows(self, raw, num_synthetic=1):
        chance = self.random
        base = {name: raw[name] for name in ("key", "source", "url")}
        if chance.random() < 0.02:
            return [base | {"verdict": "failed", "reason": "bad_image"}]
        rows = []
        texts = [(raw["origin"], 0, raw["caption"])]
        if raw["origin"] == "web":
            texts += [
                (
                    "synthetic",
                    i,
                    f"a picture of a {chance.choice(SUBJECTS)} {chance.choice(PLACES)}",
                )
                for i in range(num_synthetic)
            ]
        for origin, index, text in texts:
            row = base | {
                "origin": origin,
                "index": index,
                "text": text,
                "verdict": "kept",
                "reason": "",
            }
            if not text:
                rows.append(row | {"verdict": "dropped", "reason": "empty_caption"})
                continue
            good = chance.random() < (0.85 if origin == "synthetic" else 0.6)
            itm = chance.betavariate(6, 1.2) if good else chance.betavariate(1, 5)
            row |= {
                "itm": float(np.float32(itm)),
                "itc": float(np.float32(0.15 + 0.3 * itm + chance.gauss(0, 0.05))),
                "clip": float(np.float32(0.14 + 0.17 * itm + chance.gauss(0, 0.025))),
                "filter": "f" * 16,
                "clip_model": "a" * 16,
            }
            if origin == "synthetic":
                row |= {"num_tokens": 9, "seed": chance.getrandbits(40), "captioner": "c" * 16}
            rows.append(row)
        return rows

    def clean_row(self, raw, rows, threshold):
        base = {
            name: raw.get(name)
            for name in ("key", "source", "url", "verdict", "reason", "sha256", "width", "height")
        }
        empty = {"num_captions": 0, "num_kept": 0, "captions": [], "policy": "blip"}
        if raw["verdict"] != "kept":
            return base | empty
        if rows[0]["verdict"] == "failed":
            return base | empty | {"verdict": "failed", "reason": rows[0]["reason"]}
        captions = []
        for row in rows:
            caption = {name: row.get(name) for name in _CAPTION.names if name in row}
            caption = {**dict.fromkeys(("itm", "itc", "clip")), **caption}
            if row["verdict"] == "kept" and row["origin"] != "human" and row["itm"] < threshold:
                caption |= {"verdict": "dropped", "reason": "itm_below_threshold"}
            captions.append(caption)
        kept = sum(caption["verdict"] == "kept" for caption in captions)
        row = base | {
            "num_captions": len(captions),
            "num_kept": kept,
            "captions": captions,
            "policy": "blip",
        }
        return row if kept else row | {"verdict": "dropped", "reason": "no_caption_kept"}


def build(root, sources, *, seed=0, texts=(), stages=3, threshold=0.5):
    """Make a corpus of {source: [rows of each shard]}, and return it and its rows."""
    corpus, made = Corpus(str(root)), {"raw": [], "captions": [], "clean": []}
    corpus.write_run('name: example\nseed: 7\nhostile: "<script>window.pwned = 1</script>"\n')
    for source, shards in sources.items():
        origin = "human" if source.startswith("coco") else "web"
        for index, num_rows in enumerate(shards):
            maker = Maker(f"{seed} {source} {index}", texts)
            raw = [maker.raw_row(source, f"{index:05d}{n:04d}", origin) for n in range(num_rows)]
            images = {
                r["key"]: drawing(f"{source}{r['key']}") for r in raw if r["verdict"] == "kept"
            }
            above = commit(corpus, ("raw", source, index), raw, images=images)
            made["raw"] += raw
            if stages == 1:
                continue
            by_key = {r["key"]: maker.caption_rows(r) for r in raw if r["verdict"] == "kept"}
            rows = [row for rows in by_key.values() for row in rows]
            above = commit(corpus, ("captions", source, index), rows, inputs=above.sha256)
            made["captions"] += rows
            if stages == 2:
                continue
            clean = [maker.clean_row(r, by_key.get(r["key"]), threshold) for r in raw]
            kept = {r["key"]: images[r["key"]] for r in clean if r["verdict"] == "kept"}
            commit(corpus, ("clean", source, index), clean, images=kept, inputs=above.sha256)
            made["clean"] += clean
    return corpus, made
