"""Ray actors: a process, its resources and a lifetime around the maker of one stage's shards.

Ray is told to restart nothing: a restarting actor fails every task it is given for seconds, which
would cost shards attempts for nothing. An actor that died is buried and another one is made, and
none gets a shard before it has said that it is open.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.metrics import Counter, Histogram

from jobs.pools import Resources
from jobs.problems import Problem, problem_of
from jobs.stages.stage import Live, Made, Maker, Stage, Task

_SHARD_SECONDS = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0]


@dataclass(frozen=True, slots=True)
class Opened:
    """An actor is ready for shards."""

    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class NotOpened:
    """An actor could not get ready."""

    problem: Problem


class ShardWorker:
    """Makes shards of one stage, one after the other; every decision lives in pipeline/."""

    def __init__(self, stage: Stage) -> None:
        """Takes nothing and opens nothing, so that an actor that cannot start is Ray's doing."""
        if not ray.get_gpu_ids():
            # Ray hides GPUs only from actors that have some; the others would see all of them.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._stage = stage
        self._resources = ExitStack()
        self._maker: Maker | None = None
        self._counters = _Counters(stage.name)

    def open(self) -> Opened | NotOpened:
        """Load models and open connections."""
        try:
            self._maker = self._resources.enter_context(
                self._stage.open(Live(on_rows=_nobody, should_stop=_never))
            )
        except Exception as error:  # sorted and shown by the driver
            return NotOpened(problem_of(error))
        return Opened(ray.get_runtime_context().get_node_id(), os.getpid())

    def make(self, task: Task) -> Made | Problem:
        """Make one shard, or say what kept it from being made."""
        assert self._maker is not None, "open comes first"
        started_at = time.monotonic()
        try:
            made = self._maker.make(task)
        except Exception as error:  # sorted by the driver, which shows what is a bug
            problem = problem_of(error)
            self._counters.failed(problem)
            return problem
        seconds = time.monotonic() - started_at
        self._counters.made(made, seconds)
        return made.timed(seconds)


class _Counters:
    """What Ray exports to Prometheus, by stage."""

    def __init__(self, stage: str) -> None:
        tags = {"stage": stage}
        self._rows = Counter("capfilt_rows", "Rows by verdict and reason", ("stage", "verdict"))
        self._shards = Counter("capfilt_shards", "Attempts at shards", ("stage", "outcome"))
        self._seconds = Histogram(
            "capfilt_shard_seconds", "Time to make a shard", _SHARD_SECONDS, ("stage",)
        )
        for metric in (self._rows, self._shards, self._seconds):
            metric.set_default_tags(tags)

    def made(self, made: Made, seconds: float) -> None:
        self._shards.inc(1, {"outcome": "made" if made.is_new else "existed"})
        self._seconds.observe(seconds)
        verdicts = {
            "kept": made.counts.kept,
            "dropped": sum(made.counts.dropped.values()),
            "failed": sum(made.counts.failed.values()),
        }
        for verdict, count in verdicts.items():
            if made.is_new and count:
                self._rows.inc(count, {"verdict": verdict})

    def failed(self, problem: Problem) -> None:
        self._shards.inc(1, {"outcome": problem.kind.value})


def _nobody(rows: int, kept: int) -> None:
    """Tell nobody: in actors, shards are counted when they are done."""


def _never() -> bool:
    return False


# --- the driver's side ------------------------------------------------------------------------

Ref = ray.ObjectRef[Any]


@dataclass(slots=True, eq=False)
class Worker:
    """An actor as the driver knows it."""

    actor: ActorHandle[Any]
    born_at: float
    ref: Ref | None
    """What it is at: opening, or a shard; None when it is idle."""
    task: Task | None = None
    since: float = 0.0
    """When it got its task, or fell idle."""
    opened: Opened | None = None


@dataclass
class ActorPool:
    """The actors of one stage."""

    stage: Stage
    resources: Resources
    idle_seconds: float
    clock: Callable[[], float] = time.monotonic
    workers: list[Worker] = field(default_factory=list)
    busy_seconds: float = 0.0
    """Of all its actors, the buried ones included."""
    lived_seconds: float = 0.0
    """Of those that are buried."""
    num_stillborn: int = 0
    """Actors in a row that died before they were open."""
    _surplus_since: float | None = None

    def __post_init__(self) -> None:
        remote: Any = ray.remote(ShardWorker)
        self._class = remote.options(
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus,
            resources=dict(self.resources.custom),
            max_restarts=0,
            max_task_retries=0,
            # GPUs are taken where they are; what uses the network alone is spread over the nodes.
            scheduling_strategy="DEFAULT" if self.resources.num_gpus else "SPREAD",
        )

    @property
    def idle(self) -> list[Worker]:
        """Workers that are open and without a shard."""
        return [each for each in self.workers if each.ref is None]

    @property
    def num_open(self) -> int:
        """Workers that have a place and are open."""
        return sum(each.opened is not None for each in self.workers)

    def resize(self, wanted: int, *, is_over: bool) -> None:
        """Make actors that are missing; end those that have long been too many.

        At once when the stage is over. Else a stage that is held back for a moment would lose
        actors that take longer to start than to be needed again.
        """
        now = self.clock()
        for _ in range(wanted - len(self.workers)):
            actor = self._class.remote(self.stage)
            self.workers.append(Worker(actor, now, actor.open.remote()))
        surplus = len(self.workers) - wanted
        if surplus <= 0:
            self._surplus_since = None
            return
        if self._surplus_since is None:
            self._surplus_since = now
        if not is_over and now - self._surplus_since < self.idle_seconds:
            return
        # Those that still wait for a place go first: they would take it from another stage.
        free = sorted(
            (each for each in self.workers if each.task is None),
            key=lambda each: (each.opened is not None, each.since),
        )
        for worker in free[:surplus]:
            self.bury(worker)

    def give(self, worker: Worker, task: Task) -> None:
        """Have an idle worker make a shard."""
        worker.task, worker.since = task, self.clock()
        worker.ref = worker.actor.make.remote(task)

    def rest(self, worker: Worker) -> None:
        """Note that a worker has come back from whatever it was at."""
        now = self.clock()
        if worker.task is not None:
            self.busy_seconds += now - worker.since
        worker.ref, worker.task, worker.since = None, None, now

    def bury(self, worker: Worker) -> None:
        """End a worker, dead or alive."""
        self.rest(worker)
        self.lived_seconds += self.clock() - worker.born_at
        self.workers.remove(worker)
        ray.kill(worker.actor, no_restart=True)

    @property
    def wait_seconds(self) -> float:
        """Time its actors spent starting or without work."""
        now = self.clock()
        lived = self.lived_seconds + sum(now - each.born_at for each in self.workers)
        busy = sum(now - each.since for each in self.workers if each.task is not None)
        return max(0.0, lived - self.busy_seconds - busy)
