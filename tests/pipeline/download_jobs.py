"""A small web and the job that downloads it, shared by tests and by the processes they kill.

As a program it runs the job in forked children, for a new Python starts too slowly: each line on
stdin is `WHAT ROOT PORT`; it answers with a line when the child has begun, its process id, and one
when it has ended, its wait status.
"""

import io
import os
import random
import sys
import time
from functools import cache

import numpy as np
from PIL import Image
from scripted_server import http

from pipeline.corpus import Corpus
from pipeline.download import DownloadConfig, Downloader
from pipeline.fetch import Fetcher
from pipeline.sources.rows import HttpUrl, MalformedReason, MalformedRow, Origin, SourceRow
from pipeline.web.config import FetchConfig, RetryPolicy

SOURCE = "web"
NUM_SHARDS, ROWS_PER_SHARD = 3, 40
NUM_THREADS = 8


@cache
def picture(number, width=96, height=72, kind="JPEG"):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def healthy(number):
    return http(body=picture(number), Content_Type="image/jpeg")


def sick(number):
    """What the web answers for some of its images: every kind of cause, the same every time."""
    data = picture(number)
    match number % 20:
        case 3:
            return http("404 Not Found", b"gone")
        case 7:
            return http("503 Service Unavailable", b"later")
        case 9:
            return http(body=data[: len(data) // 2])
        case 11:
            return http(body=b"<html>not here</html>", Content_Type="image/jpeg")
        case 13:
            return iter([http(body=data)[:-40]])  # the body ends early
        case 15:
            return http(body=data, X_Robots_Tag="noai")
        case 17:
            return http(body=picture(number, kind="PNG"))
        case 18:
            return iter(())  # hangs up
    return healthy(number)


def number_of(request):
    return int(request.path.rpartition("/")[2])


def slow_and_sick(request):
    """Answers after a moment that differs from call to call, so that rows overtake each other."""
    time.sleep(random.random() * 0.01)
    return sick(number_of(request))


def slow_and_healed(request):
    time.sleep(random.random() * 0.01)
    number = number_of(request)
    return healthy(number) if number % 20 in (7, 13, 18) else sick(number)


def web_row(base_url, number, **changes):
    fields = {
        "source": SOURCE,
        "location": HttpUrl(f"{base_url}/i/{number}"),
        "captions": (f"picture {number}",),
        "origin": Origin.WEB,
        "extra": {"similarity": number / 7, "LICENSE": "?"},
    }
    return SourceRow(**(fields | changes))


def malformed_row(line=12):
    return MalformedRow(
        source=SOURCE,
        file="list.tsv",
        line=line,
        reason=MalformedReason.TOO_FEW_COLUMNS,
        detail="1 column, not 2",
    )


def shard_rows(base_url, index):
    for number in range(index * ROWS_PER_SHARD, (index + 1) * ROWS_PER_SHARD):
        yield malformed_row(number) if number % 20 == 19 else web_row(base_url, number)


def fetch_config(**changes):
    """Loopback alone, one attempt, short waits."""
    fields = {
        "allowed_networks": ("127.0.0.1/32",),
        "allowed_ports": "any",
        "timeout_seconds": 20.0,
        "total_seconds": 30.0,
        "max_connections_per_host": 64,
        "max_idle_connections": 64,
        "retry": RetryPolicy(max_attempts=1),
    }
    return FetchConfig(**(fields | changes))


def download_config(**changes):
    fields = {
        "image_size_px": 48,
        "rows_per_shard": ROWS_PER_SHARD,
        "num_threads": NUM_THREADS,
    }
    return DownloadConfig(**(fields | changes))


def download_all(root, base_url, config=None):
    corpus = Corpus(root)
    corpus.write_run("a: run\n")
    corpus.sweep()
    with Fetcher(fetch_config()) as fetcher:
        downloader = Downloader(corpus, config or download_config(), fetcher, fingerprint="f")
        for index in range(NUM_SHARDS):
            downloader.download(SOURCE, index, shard_rows(base_url, index))
    corpus.sweep()


def retry_all(root, base_url):
    corpus = Corpus(root)
    corpus.sweep()
    with Fetcher(fetch_config()) as fetcher:
        downloader = Downloader(corpus, download_config(), fetcher, fingerprint="f")
        for record in corpus.shards("raw", SOURCE):
            downloader.retry(record, shard_rows(base_url, record.index))
    corpus.sweep()


def tree(root):
    """Every file below the root with its bytes."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as stream:
                found[os.path.relpath(path, root)] = stream.read()
    return found


JOBS = {"download": download_all, "retry": retry_all}


def say(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def serve():
    for line in sys.stdin:
        what, root, port = line.split()
        child = os.fork()
        if not child:
            try:
                JOBS[what](root, f"http://127.0.0.1:{port}")
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        say(child)
        say(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve()
