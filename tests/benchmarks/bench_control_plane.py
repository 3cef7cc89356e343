"""What a run costs besides its work, at the size of 129 million pairs: 12,900 shards of 10,000.

    python tests/benchmarks/bench_control_plane.py [--shards 12900] [--s3-shards 12900] [--cold]

1. Shards that take no time, through the real board, driver, actors and heartbeat, on a Ray of its
   own: one stage, then a chain of three.
2. What a resume does before it begins: every marker of three stages listed and read, on a local
   disk and on an S3 server on loopback (moto, in a process of its own).
"""

import argparse
import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from jobs import catalogue
from jobs.board import Board, StageBoard
from jobs.catalogue import Catalogue, Place
from jobs.chain import limits_of
from jobs.driver import work_on_ray
from jobs.durable import driving
from jobs.ray_start import ray_place
from jobs.run_config import PoolConfig, RunConfig
from jobs.stages.stage import Commit, Made, Task
from jobs.tidy import tidy
from jobs.watching import watched
from pipeline.corpus import Corpus
from pipeline.record import Counts, FileRecord, ShardRecord

CHAIN = (("download", "raw"), ("score", "captions"), ("select", "clean"))
ROWS_PER_SHARD = 10_000
SOURCE = "web"
BUCKET = "bench"


@dataclass(frozen=True)
class NoStage:
    """Makes nothing, at once."""

    name: str
    folder: str

    def accepts(self, record):
        return True

    @contextmanager
    def open(self, live):
        yield self

    def make(self, task):
        commit = Commit(f"{task.folder}{task.index}", above(task), "f", task.num_rows)
        return Made(commit, Counts(kept=task.num_rows), is_new=True, num_kept=task.num_rows)


def above(task):
    folders = [folder for _, folder in CHAIN]
    place = folders.index(task.folder)
    return f"{folders[place - 1]}{task.index}" if place else None


def drive(num_shards: int, num_stages: int, num_workers: int) -> None:
    """Bring shards that take no time through actors, and print what it took."""
    config = RunConfig(workers=num_workers, score=PoolConfig(), engine="ray")
    stages = [NoStage(name, folder) for name, folder in CHAIN[:num_stages]]
    boards = [
        StageBoard(
            each.name,
            each.folder,
            {(SOURCE, n): Task(each.folder, SOURCE, n, ROWS_PER_SHARD) for n in range(num_shards)},
        )
        for each in stages
    ]
    names = [each.name for each in stages]
    with (
        tempfile.TemporaryDirectory() as folder,
        driving(corpus := Corpus(folder), config, name="bench") as heart,
        ray_place(config, names, None) as place,
        watched(
            Board(boards, limits_of(config, names)), heart, Catalogue(corpus), lambda: False
        ) as watching,
    ):
        started_at, cpu = time.monotonic(), time.process_time()
        work_on_ray(stages, watching.board, watching, config, place)
        seconds, cpu = time.monotonic() - started_at, time.process_time() - cpu
    assert all(len(each.done) == num_shards for each in boards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"driver: {num_shards:,} shards x {num_stages} stages, {num_workers} actors each: "
        f"{seconds:,.1f} s ({1000 * seconds / num_shards / num_stages:.2f} ms a shard and stage), "
        f"{cpu:,.1f} s of CPU, {peak:,.0f} MiB at most",
        flush=True,
    )


def record(stage: str, index: int, inputs: str | None, suffixes: tuple[str, ...]) -> ShardRecord:
    """Return a marker as a real one is: counts by reason, stats, hashes."""
    kept = ROWS_PER_SHARD * 7 // 10
    failed = {"not_found": 1500, "timeout": 600, "dns": 300, "not_an_image": 100}
    counts = Counts(kept=kept, dropped={"too_small": 500}, failed=failed)
    file = FileRecord(bytes=400_000_000, sha256=f"{index:064x}")
    return ShardRecord(
        stage=stage,
        source=SOURCE,
        index=index,
        rows_in=ROWS_PER_SHARD,
        counts=counts,
        stats={},
        fingerprint="0123456789abcdef",
        inputs=inputs,
        files=dict.fromkeys(suffixes, file),
    ).sealed()


def markers(num_shards: int) -> Iterator[ShardRecord]:
    """Yield the markers of a finished corpus."""
    for index in range(num_shards):
        raw = record("raw", index, None, ("parquet", "tar"))
        scored = record("captions", index, raw.sha256, ("parquet",))
        yield from (raw, scored, record("clean", index, scored.sha256, ("parquet", "tar")))


def files(num_shards: int) -> Iterator[tuple[str, bytes]]:
    """Yield each file's path and content: markers as they are, and nothing in the others."""
    for each in markers(num_shards):
        yield from ((f"{each.name}.{suffix}", b"") for suffix in each.files)
        yield f"{each.name}.json", each.to_bytes()


def fill(root: str, num_shards: int) -> None:
    """Write a finished corpus to a local folder."""
    for folder in ("raw", "captions", "clean"):
        Path(root, folder, SOURCE).mkdir(parents=True)
    for path, data in files(num_shards):
        Path(root, path).write_bytes(data)


def remember(corpus: Corpus, num_shards: int) -> None:
    """Leave behind what a run does that has made these shards, or read them once."""
    memory = Catalogue(corpus)
    memory.note(
        (Place(each.stage, each.source, each.index), Commit.of(each))
        for each in markers(num_shards)
    )
    memory.save()


def scan(title: str, corpus: Corpus, num_shards: int) -> None:
    """Do what a resume does before it begins: look for debris, then read what exists."""
    started_at, cpu = time.monotonic(), time.process_time()
    tags = tidy(corpus)
    seen_at = time.monotonic()
    memory = Catalogue.load(corpus, tags)
    done = {folder: memory.of(folder, SOURCE) for _, folder in CHAIN}
    seconds, cpu = time.monotonic() - started_at, time.process_time() - cpu
    assert all(len(each) == num_shards for each in done.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"resume scan, {title}: {num_shards:,} shards x 3 stages: {seconds:,.1f} s "
        f"({seen_at - started_at:,.1f} s of it listing), {cpu:,.1f} s of CPU here, "
        f"{peak:,.0f} MiB at most",
        flush=True,
    )
    memory.save()


def serve_s3(num_shards: int) -> None:
    """Serve a finished corpus by S3's protocol until stdin ends; prints the port."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(BUCKET, "us-east-1")
    for path, data in files(num_shards):  # over the wire it would take a quarter of an hour
        backend.put_object(BUCKET, f"corpus/{path}", data)
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()


@contextmanager
def s3_corpus(num_shards: int) -> Iterator[Corpus]:
    """Give a finished corpus on an S3 server on loopback, in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(num_shards)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    client = {
        "endpoint_url": f"http://127.0.0.1:{int(server.stdout.readline())}",
        "region_name": "us-east-1",
    }
    try:
        yield Corpus(
            f"s3://{BUCKET}/corpus", {"key": "test", "secret": "test", "client_kwargs": client}
        )
    finally:
        server.kill()
        server.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=12_900)
    parser.add_argument("--s3-shards", type=int, default=12_900)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="read every marker from S3 too")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve_s3(options.serve)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    for num_stages in (1, 3):
        drive(options.shards, num_stages, options.workers)
        gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        fill(folder, options.shards)
        scan("local disk", Corpus(folder), options.shards)
    with s3_corpus(options.s3_shards) as corpus:
        remember(corpus, options.s3_shards)
        scan("S3 on loopback, as after a run", corpus, options.s3_shards)
        if options.cold:
            corpus.store.remove(catalogue.FILE)
            scan("S3 on loopback, nothing remembered", corpus, options.s3_shards)


if __name__ == "__main__":
    main()
