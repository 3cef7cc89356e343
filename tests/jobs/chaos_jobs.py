"""The whole job on a small corpus, for tests that kill it; its images lie on a disk.

As a program it runs the command line in forked children, for a new Python starts too slowly: each
line on stdin is a JSON object (see `Children.start`); it answers with the child's process id when
it has begun, and with its wait status when it has ended.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from jobs.durable import count_shards
from jobs.status import read_status
from pipeline.corpus import Corpus
from pipeline.verify import verify

NUM_ROWS, ROWS_PER_SHARD = 24, 6
SOURCES = {"web": "web", "human": "human"}
SHARDS = NUM_ROWS // ROWS_PER_SHARD
FOLDERS = ("raw", "captions", "clean")
NUM_SHARDS = SHARDS * len(SOURCES)
NUM_MARKERS = NUM_SHARDS * len(FOLDERS)


def write_world(folder):
    """Write images, lists and a recipe below a folder; return the recipe's path."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(NUM_ROWS):
        image = rng.integers(0, 256, (40 + number % 5, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), image)
    for source in SOURCES:
        lines = ["name\tcaption"]
        for number in range(NUM_ROWS):
            name = f"gone{number}.jpg" if number % 7 == 3 else f"{number}.jpg"
            caption = "" if number % 11 == 5 else f"{source} picture number {number}"
            lines.append("broken" if number % 13 == 6 else f"{name}\t{caption}")
        (folder / f"{source}.tsv").write_text("\n".join(lines) + "\n")
    sources = "\n".join(
        f"  - {{name: {name}, format: table, paths: [{folder}/{name}.tsv], url_column: name, "
        f"origin: {origin}, image_root: {folder}/images}}"
        for name, origin in SOURCES.items()
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: chaos\nroot: {folder}/unset\nsources:\n{sources}\n"
        f"download: {{rows_per_shard: {ROWS_PER_SHARD}, image_size_px: 32, num_threads: 2}}\n"
        "score: {batch_size: 4, num_decoders: 1}\n"
        "select: {policy: web_only}\n"
        "run: {score: {num_gpus: 0, max_actors: 1}, idle_seconds: 2, drain_seconds: 5}\n"
    )
    return recipe


def num_committed(root, folders=FOLDERS):
    """Count markers as they are now; a corpus on a local disk."""
    return sum(1 for f in folders for _ in Path(root, f).glob("*/[0-9]*.json"))


def tree(store):
    """Every file of the three stages with its bytes, whatever the corpus is on."""
    found = {}
    for folder in FOLDERS:
        for source in store.list(folder).folders:
            for name in store.list(f"{folder}/{source}").sizes:
                found[f"{folder}/{source}/{name}"] = store.read(f"{folder}/{source}/{name}")
            assert store.list(f"{folder}/{source}").folders == []
    return found


def command(world, root, *sets):
    return ["run", world, f"--set=root={root}", *(f"--set={each}" for each in sets)]


def check_status(root, states):
    """The status agrees with what is there, and says how the run is."""
    corpus = Corpus(str(root))
    status = read_status(corpus.root, datetime.now(UTC))
    assert status.state in states
    there = {f: sum(count_shards(corpus, f).values()) for f in FOLDERS}
    shown = {each.folder: each.num_shards for each in status.made}
    assert {folder: shown.get(folder, 0) for folder in FOLDERS} == there
    for stage in status.run.stages:
        assert stage.shards_total == NUM_SHARDS
        assert stage.shards_done <= there[stage.folder]
    return status


def check_whole(root, expected):
    """Not a byte, a row or a file tells of what happened on the way."""
    corpus = Corpus(str(root))
    assert tree(corpus.store) == expected
    assert list(verify(corpus)) == []
    for folder in ("raw", "clean"):
        for source in SOURCES:
            records = corpus.shards(folder, source)
            assert sum(record.rows_in for record in records) == NUM_ROWS
            assert sum(record.counts.total for record in records) == NUM_ROWS
    status = check_status(root, {"done"})
    assert all(stage.shards_done == NUM_SHARDS for stage in status.run.stages)


class Children:
    """Runs `capfilt` in forked children of one warm process."""

    def __init__(self, folder):
        self._output = folder / "output.txt"
        here = Path(__file__).parent
        self._parent = subprocess.Popen(
            [sys.executable, str(here / "chaos_jobs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"},
        )

    def start(self, arguments, *, max_file_bytes=None, environment=None):
        """Begin `capfilt ARGUMENTS`; return its process id. It leads a session of its own."""
        job = {
            "arguments": [str(each) for each in arguments],
            "max_file_bytes": max_file_bytes,
            "environment": environment or {},
            "output": str(self._output),
        }
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def wait(self):
        """Return the exit code of the child; negative for the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self._parent.stdout.readline()))

    def run(self, arguments, **options):
        """Run `capfilt ARGUMENTS` to its end; return its exit code."""
        self.start(arguments, **options)
        return self.wait()

    @property
    def output(self):
        """What the last child printed."""
        return self._output.read_text()

    def close(self):
        self._parent.stdin.close()
        self._parent.wait(timeout=60)
        self._parent.stdout.close()


def kill_once(is_time, victims, has_ended):
    """Have a thread kill what `victims()` names, all at once, as soon as `is_time()`."""

    def wait_and_kill():
        while not has_ended.wait(0.002):
            if is_time():
                for pid in victims():
                    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                        os.kill(pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def processes():
    """Give the parent, the session and the command line of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[int(path.name)] = (int(fields[1]), int(fields[3]), command)
    return found


def descendants(pid):
    """Return a process's children, and theirs; not those that have lost their parent."""
    table = processes()
    family, size = {pid}, 0
    while len(family) != size:
        size = len(family)
        family |= {each for each, (parent, _, _) in table.items() if parent in family}
    return family - {pid}


def serve():
    import resource

    import jobs.cli
    import jobs.driver  # noqa: F401 (imported before forking, so that children need not)
    import jobs.run
    import jobs.stages.score
    import jobs.stages.select

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(job["environment"])
            if job["max_file_bytes"] is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"], limit))
            try:
                jobs.cli.main(job["arguments"])
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 99  # what a person would see as a traceback
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
