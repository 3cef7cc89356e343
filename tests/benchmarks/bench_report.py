"""How long the report takes over ledgers of a million rows and more, and in how much memory.

    python tests/benchmarks/bench_report.py --rows 1000000 --rows 10000000

Makes the ledgers of each size (without images), reports on them in a process of its own with two
threads, and prints wall time, CPU time, peak memory and what the same rate would take for 129
million rows. The folder is removed afterwards.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus import Corpus
from pipeline.download_row import RAW_SCHEMA
from pipeline.record import Counts

BLIP2_ROWS = 129_000_000
ROWS_PER_SHARD = 100_000
SOURCES = ("laion", "cc3m", "cc12m", "sbu")
WORDS = 20_000
FAILURES = ("http_404", "timeout", "dns_failure", "not_an_image")


class Synthesiser:
    """Makes one shard's three ledgers at a time, with the spread of values of the real ones."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.words = np.array([f"w{i}x" for i in range(WORDS)])
        rank = np.arange(1, WORDS + 1)
        self.share = (1 / rank) / (1 / rank).sum()

    def texts(self, count):
        lengths = self.random.integers(4, 16, count)
        words = self.random.choice(self.words, lengths.sum(), p=self.share)
        ends = np.cumsum(lengths)
        return [" ".join(words[end - n : end]) for n, end in zip(lengths, ends, strict=True)]

    def hexes(self, count, digits):
        data = self.random.bytes(count * digits // 2).hex()
        return [data[i : i + digits] for i in range(0, len(data), digits)]

    def raw(self, source, index, count):
        random = self.random
        kept = random.random(count) < 0.8
        reason = np.where(kept, "", random.choice(FAILURES, count))
        hosts = random.zipf(1.3, count) % 200_000
        side = random.integers(200, 3000, (2, count))
        none = ~kept
        columns = {
            "key": [f"{index:05d}{row:06d}" for row in range(count)],
            "source": [source] * count,
            "url": [
                f"https://host{h}.example.org/images/{index}/{row}/photo.jpg"
                for row, h in enumerate(hosts)
            ],
            "verdict": np.where(kept, "kept", "failed"),
            "reason": reason,
            "caption": self.texts(count),
            "num_captions": np.ones(count, np.int32),
            "origin": ["web"] * count,
            "status": np.where(kept, "success", "failed_to_download"),
            "http_status": pa.array(np.where(kept, 200, 404).astype(np.int32)),
            "attempts": random.integers(1, 4, count).astype(np.int32),
            "num_bytes": pa.array(random.integers(5_000, 900_000, count), mask=none),
            "sha256": pa.array(self.hexes(count, 64), mask=none),
            "phash": pa.array(self.hexes(count, 16), mask=none),
            "width": pa.array(np.full(count, 384, np.int32), mask=none),
            "height": pa.array(np.full(count, 384, np.int32), mask=none),
            "original_width": pa.array(side[0].astype(np.int32), mask=none),
            "original_height": pa.array(side[1].astype(np.int32), mask=none),
        }
        arrays = [columns.get(f.name, pa.nulls(count, f.type)) for f in RAW_SCHEMA]
        return pa.table([pa.array(a) for a in arrays], schema=RAW_SCHEMA)

    def captions(self, raw):
        kept = raw.filter(pa.compute.equal(raw["verdict"], "kept"))
        count = kept.num_rows
        synthetic = self.texts(count)
        random = self.random

        def both(first, second):
            return np.stack([np.asarray(first), np.asarray(second)], 1).ravel()

        def scores(low, high):
            return np.clip(random.beta(2, 2, 2 * count), 0, 1).astype(np.float32) * (
                high - low
            ) + np.float32(low)

        ones = np.ones(count, np.int32)
        return pa.table(
            {
                "key": np.repeat(kept["key"].to_numpy(), 2),
                "source": np.repeat(kept["source"].to_numpy(), 2),
                "url": np.repeat(kept["url"].to_numpy(), 2),
                "verdict": ["kept"] * (2 * count),
                "reason": [""] * (2 * count),
                "origin": both(["web"] * count, ["synthetic"] * count),
                "index": pa.array(np.zeros(2 * count, np.int32)),
                "text": both(kept["caption"].to_numpy(), synthetic),
                "num_tokens": both(ones, ones * 12).astype(np.int32),
                "seed": np.zeros(2 * count, np.int64),
                "itm": scores(0, 1),
                "itc": scores(-0.1, 0.6),
                "clip": scores(0, 0.45),
                "captioner": ["c" * 16] * (2 * count),
                "filter": ["f" * 16] * (2 * count),
                "clip_model": ["a" * 16] * (2 * count),
            }
        )

    def clean(self, raw, captions):
        has_image = pa.compute.equal(raw["verdict"], "kept").to_numpy()
        passes = captions["itm"].to_numpy() >= 0.5
        per_image = passes.reshape(-1, 2).sum(1).astype(np.int32)
        num_kept = np.zeros(len(has_image), np.int32)
        num_kept[has_image] = per_image
        offsets = np.zeros(len(has_image) + 1, np.int32)
        offsets[1:] = np.cumsum(np.where(has_image, 2, 0))
        names = ("text", "origin", "index", "itm", "itc", "clip")
        fields = {name: captions[name].combine_chunks() for name in names}
        fields["verdict"] = pa.array(np.where(passes, "kept", "dropped"))
        fields["reason"] = pa.array(np.where(passes, "", "low_itm"))
        struct = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        is_kept = num_kept > 0
        lost = raw["reason"].to_numpy()
        return pa.table(
            {
                "key": raw["key"],
                "source": raw["source"],
                "url": raw["url"],
                "verdict": np.where(is_kept, "kept", np.where(has_image, "dropped", "failed")),
                "reason": np.where(is_kept, "", np.where(has_image, "no_caption_kept", lost)),
                "sha256": raw["sha256"],
                "width": raw["width"],
                "height": raw["height"],
                "num_captions": np.where(has_image, 2, 0).astype(np.int32),
                "num_kept": num_kept,
                "captions": pa.ListArray.from_arrays(pa.array(offsets), struct),
                "image_offset": pa.nulls(len(has_image), pa.int64()),
                "image_bytes": pa.nulls(len(has_image), pa.int64()),
                "policy": ["blip"] * len(has_image),
            }
        )


def counts_of(table):
    verdicts = zip(table["verdict"].to_pylist(), table["reason"].to_pylist(), strict=True)
    tally = {}
    for outcome in verdicts:
        tally[outcome] = tally.get(outcome, 0) + 1
    return Counts.of(tally)


def commit(corpus, stage, source, index, table, inputs=None):
    with corpus.writer(stage, source, index, fingerprint="0" * 16, inputs=inputs) as writer:
        pq.write_table(table, writer.path("parquet"), compression="zstd", row_group_size=10_000)
        return writer.commit(rows_in=table.num_rows, counts=counts_of(table))


def build(root, num_rows):
    corpus, maker = Corpus(str(root)), Synthesiser(7)
    for number in range(-(-num_rows // ROWS_PER_SHARD)):
        source, index = SOURCES[number % len(SOURCES)], number // len(SOURCES)
        count = min(ROWS_PER_SHARD, num_rows - number * ROWS_PER_SHARD)
        raw = maker.raw(source, index, count)
        captions = maker.captions(raw)
        above = commit(corpus, "raw", source, index, raw)
        above = commit(corpus, "captions", source, index, captions, above.sha256)
        commit(corpus, "clean", source, index, maker.clean(raw, captions), above.sha256)


def measure(num_rows, folder):
    root = Path(folder) / str(num_rows)
    started = time.monotonic()
    build(root, num_rows)
    made = time.monotonic() - started
    size = sum(path.stat().st_size for path in root.rglob("*.parquet"))
    print(f"{num_rows:,} rows: {size / 2**30:.2f} GiB of ledgers made in {made:.0f} s", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run([sys.executable, __file__, "--report", str(root)], check=True)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{num_rows:,} rows: {wall:.1f} s wall, {cpu:.1f} s CPU, peak {after.ru_maxrss / 2**20:.2f}"
        f" GiB, {1e6 * wall / num_rows:.1f} s per million; at this rate {BLIP2_ROWS / 1e6:.0f} "
        f"million rows take {BLIP2_ROWS / num_rows * wall / 60:.0f} minutes",
        flush=True,
    )
    shutil.rmtree(root)


def report(root):
    from pipeline.report.build import build_report

    print(build_report(Corpus(root)).page)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, action="append", help="(default: 1000000)")
    parser.add_argument("--folder", help="where to make the ledgers (default: a temporary one)")
    parser.add_argument("--keep", help="only make ledgers, here")
    parser.add_argument("--report", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        report(options.report)
        return
    if options.keep:
        build(options.keep, (options.rows or [1_000_000])[0])
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for num_rows in sorted(options.rows or [1_000_000]):
            measure(num_rows, folder)


if __name__ == "__main__":
    main()
