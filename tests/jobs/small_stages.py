"""Stages that commit real shards of one row, and misbehave where they are told to.

They travel to Ray's workers by value, for those cannot import what stands among the tests.
"""

import json
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray

from jobs.board import Board, StageBoard
from jobs.catalogue import Catalogue
from jobs.chain import limits_of
from jobs.durable import driving
from jobs.errors import UserError
from jobs.stages.stage import Commit, Made, StoppedError, Task
from jobs.watching import watched
from pipeline.corpus import Corpus
from pipeline.layout import UPSTREAM
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.sample import ShardError

SOURCE = "web"
CHAIN = (("download", "raw"), ("score", "captions"), ("select", "clean"))


@dataclass(frozen=True)
class SmallStage:
    """Makes one-row shards; `does` says what becomes of an attempt, by index: one word each."""

    name: str
    folder: str
    root: str
    notes: str
    """A folder in which what happened is noted, by all workers."""
    does: dict[int, list[str]] = field(default_factory=dict)
    opening: str = ""
    seconds: float = 0.0

    def accepts(self, record):
        return True

    @contextmanager
    def open(self, live):
        if self.opening == "user":
            raise UserError("no such model")
        if self.opening == "bug":
            raise KeyError("what is missing")
        if self.opening == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("opened", gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
        yield SmallMaker(self, Corpus(self.root), live)

    def note(self, what, **more):
        line = {"what": what, "stage": self.name, "pid": os.getpid(), "at": time.time(), **more}
        path = Path(self.notes, f"{time.time_ns()}-{os.getpid()}")
        path.with_suffix(".new").write_text(json.dumps(line))
        path.with_suffix(".new").rename(path.with_suffix(".json"))


@dataclass
class SmallMaker:
    stage: SmallStage
    corpus: Corpus
    live: object

    def make(self, task):
        attempt = self._attempt(task)
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self.stage.note("began", index=task.index, attempt=attempt, node=node)
        does = self.stage.does.get(task.index, [])
        self._misbehave(does[attempt] if attempt < len(does) else "", task)
        made = self._make(task)
        self.stage.note("made", index=task.index)
        return made

    def _attempt(self, task):
        """Number the attempts at a shard, over all workers."""
        number = 0
        while True:
            path = Path(self.stage.notes, f"{self.stage.name}{task.index}.attempt{number}")
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
                return number
            except FileExistsError:
                number += 1

    def _misbehave(self, how, task):
        time.sleep(self.stage.seconds)
        match how:
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "bug":
                raise KeyError("what is missing")
            case "bad":
                raise ShardError(f"shard {task.name}: bad data")
            case "storage":
                raise ConnectionResetError("storage is away")
            case "user":
                raise UserError("the recipe makes no sense")
            case "stopped":
                raise StoppedError("asked to stop")
            case "hangs":
                time.sleep(600)

    def _make(self, task):
        stage, above = self.stage, UPSTREAM.get(self.stage.folder)
        upstream = self.corpus.record(above, task.source, task.index) if above else None
        existing = self.corpus.record(stage.folder, task.source, task.index)
        row = {"key": "k", "source": "web", "url": None, "verdict": "kept", "reason": ""}
        inputs = upstream.sha256 if upstream else None
        with (
            self.corpus.writer(
                stage.folder, task.source, task.index, fingerprint="f", inputs=inputs
            ) as writer,
            LedgerWriter(writer.path("parquet"), ledger_schema()) as ledger,
        ):
            ledger.write(row)
            ledger.close()
            record = writer.commit(rows_in=1, counts=ledger.counts)
        self.live.on_rows(1, 1)
        return Made(
            commit=Commit.of(record), counts=record.counts, is_new=existing is None, num_kept=1
        )


@dataclass
class Box:
    """A corpus, a folder for notes, and what a run of small stages over them came to."""

    folder: Path

    def __post_init__(self):
        self.notes_folder = self.folder / "notes"
        self.notes_folder.mkdir(parents=True, exist_ok=True)
        self.root = str(self.folder / "corpus")

    def stage(self, number=0, **options):
        name, folder = CHAIN[number]
        return SmallStage(name, folder, self.root, str(self.notes_folder), **options)

    def run(self, stages, num_shards, config, work, should_stop=lambda: False):
        """Have `work(stages, board, watching)` make the shards; return what watched it."""
        boards = [
            StageBoard(
                stage.name,
                stage.folder,
                {(SOURCE, n): Task(stage.folder, SOURCE, n, 1) for n in range(num_shards)},
            )
            for stage in stages
        ]
        corpus = Corpus(self.root)
        for each in boards:
            each.done = {
                (SOURCE, r.index): Commit.of(r) for r in corpus.shards(each.folder, SOURCE)
            }
        board = Board(boards, limits_of(config, [stage.name for stage in stages]))
        with (
            driving(corpus, config, name="box") as heart,
            watched(board, heart, Catalogue(corpus), should_stop) as w,
        ):
            work(stages, board, w)
        return w

    def notes(self, what=None):
        lines = [json.loads(p.read_text()) for p in sorted(self.notes_folder.glob("*.json"))]
        return [line for line in lines if what in (None, line["what"])]

    def shards(self, folder="raw"):
        return [record.index for record in Corpus(self.root).shards(folder)]
