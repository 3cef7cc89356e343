"""A run on a cluster, simulated: the real board and pool sizes, with invented times and failures.

What a driver does with actors, shards and stages is decided by the same code as in a run
(`jobs.board`, `jobs.pools`); only nodes, actors and durations are drawn here, from a seed. Times
are seconds from the start.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from jobs.board import Board, StageBoard
from jobs.pools import Bounds, wanted_actors
from jobs.problems import Kind, Problem
from jobs.stages.stage import Commit, Made, Task
from pipeline.record import Counts

_TICK_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class SimNodes:
    """A pool of nodes that grows from zero."""

    name: str
    max_nodes: int
    num_cpus: float
    num_gpus: float
    start_seconds: float = 240.0
    """From asking for a node to its first actor; it is paid for."""
    idle_seconds: float = 300.0
    """How long a node without actors is kept."""
    preemptions_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class SimStage:
    """A stage's actors, and how long they take."""

    name: str
    nodes: str
    """The pool that its actors are placed in."""
    bounds: Bounds
    num_cpus: float
    num_gpus: float
    row_seconds: Mapping[str, float]
    """The mean time of one row of the lists, by source."""
    start_seconds: float = 10.0
    """From being placed to the first shard: imports, models."""


@dataclass(frozen=True, slots=True)
class Luck:
    """How much goes wrong."""

    spread: float = 0.25
    """Standard deviation of a shard's time, as a share of it."""
    straggler_share: float = 0.002
    straggler_factor: float = 8.0
    failure_share: float = 0.001
    """Attempts at a shard that fail."""
    idle_seconds: float = 30.0
    """How long an actor that is too many stays (`run.idle_seconds`)."""


@dataclass(slots=True)
class SimResult:
    """What a simulated run came to."""

    seconds: float = 0.0
    node_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of the actors of each stage, shards that were lost included."""
    peak_nodes: Counter[str] = field(default_factory=Counter)
    shards_made: Counter[str] = field(default_factory=Counter)
    num_preemptions: int = 0
    num_lost: int = 0
    """Attempts that ended with their node."""
    num_second_copies: int = 0
    num_set_aside: int = 0


@dataclass(slots=True, eq=False)
class _Node:
    pool: SimNodes
    asked_at: float
    is_up: bool = False
    cpus: float = 0.0
    gpus: float = 0.0
    actors: "set[_Actor]" = field(default_factory=set)
    idle_since: float = 0.0


@dataclass(slots=True, eq=False)
class _Actor:
    stage: SimStage
    node: _Node | None = None
    is_open: bool = False
    task: Task | None = None
    since: float = 0.0
    is_dead: bool = False


_Kind = Literal["tick", "node", "open", "shard", "preempt"]


class Simulation:
    """One run; `board` is as it would be laid out for the real one."""

    def __init__(
        self,
        board: Board,
        stages: Sequence[SimStage],
        nodes: Sequence[SimNodes],
        *,
        luck: Luck | None = None,
        seed: int = 0,
    ) -> None:
        self.board = board
        self.now = 0.0
        self.result = SimResult()
        self._stages = {each.name: each for each in stages}
        self._boards = {each.name: each for each in board.stages}
        folders = [each.folder for each in board.stages]
        self._above = dict(zip(folders, [None, *board.stages], strict=False))
        self._pools = {each.name: each for each in nodes}
        self._nodes: dict[str, list[_Node]] = {each.name: [] for each in nodes}
        self._actors: dict[str, list[_Actor]] = {each.name: [] for each in stages}
        self._surplus_since: dict[str, float | None] = dict.fromkeys(self._stages)
        self._luck = luck or Luck()
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, _Kind, _Node | _Actor | None]] = []
        self._order = count()
        self._digests = count(1)

    def run(self, *, max_days: float = 3650.0) -> SimResult:
        """Return what the run came to. Raises RuntimeError if it makes no end."""
        self._at(0.0, "tick", None)
        while not self.board.is_finished:
            self.now, _, kind, subject = heapq.heappop(self._events)
            if self.now > max_days * 86400:
                raise RuntimeError(f"the simulated run is not done after {max_days:g} days")
            self._happen(kind, subject)
            self._hand_out()
        for nodes in self._nodes.values():
            for node in list(nodes):
                self._release(node)
        self.result.seconds = self.now
        self.result.num_set_aside = sum(len(stage.failures) for stage in self.board.stages)
        return self.result

    def _at(self, seconds: float, kind: _Kind, subject: _Node | _Actor | None) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), kind, subject))

    def _happen(self, kind: _Kind, subject: _Node | _Actor | None) -> None:
        if kind == "tick":
            self._at(_TICK_SECONDS, "tick", None)
            self._scale()
        elif isinstance(subject, _Node) and kind == "node":
            self._node_is_up(subject)
        elif isinstance(subject, _Node) and subject in self._nodes[subject.pool.name]:
            self._preempt(subject)
        elif isinstance(subject, _Actor) and not subject.is_dead:
            if kind == "open":
                subject.is_open, subject.since = True, self.now
            else:
                self._shard_ends(subject)

    # --- as in the driver ---------------------------------------------------------------------

    def _hand_out(self) -> None:
        for name in reversed(self._stages):
            stage = self._boards[name]
            bounds = self._stages[name].bounds
            self._resize(name, wanted_actors(self.board, stage, bounds, self.now))
            for actor in self._actors[name]:
                if actor.task is None and actor.is_open and not self._give(actor, stage):
                    break

    def _give(self, actor: _Actor, stage: StageBoard) -> bool:
        task = self.board.take(stage, self.now)
        if task is None:
            task = self.board.take_straggler(stage, self.now)
            self.result.num_second_copies += task is not None
        if task is None:
            return False
        actor.task, actor.since = task, self.now
        self._at(self._draw_seconds(actor.stage, task), "shard", actor)
        return True

    def _resize(self, name: str, wanted: int) -> None:
        actors = self._actors[name]
        for _ in range(wanted - len(actors)):
            actor = _Actor(self._stages[name], since=self.now)
            actors.append(actor)
            self._place(actor)
        surplus = len(actors) - wanted
        if surplus <= 0:
            self._surplus_since[name] = None
            return
        since = self._surplus_since[name]
        self._surplus_since[name] = since = self.now if since is None else since
        if wanted and self.now - since < self._luck.idle_seconds:
            return
        free = [actor for actor in actors if actor.task is None]
        for actor in sorted(free, key=lambda each: (each.is_open, each.since))[:surplus]:
            self._end(actor)

    # --- nodes --------------------------------------------------------------------------------

    def _place(self, actor: _Actor) -> bool:
        need = actor.stage
        for node in self._nodes[need.nodes]:
            if node.is_up and node.cpus >= need.num_cpus and node.gpus >= need.num_gpus:
                node.cpus -= need.num_cpus
                node.gpus -= need.num_gpus
                node.actors.add(actor)
                actor.node = node
                self._at(need.start_seconds, "open", actor)
                return True
        return False

    def _scale(self) -> None:
        """Ask for nodes for the actors that wait, and let go of those that have none."""
        for name, pool in self._pools.items():
            waiting = [
                actor
                for actors in self._actors.values()
                for actor in actors
                if actor.node is None and actor.stage.nodes == name
            ]
            nodes = self._nodes[name]
            room = sum(_places(pool, waiting[0].stage) for n in nodes if not n.is_up and waiting)
            while waiting and len(waiting) > room and len(nodes) < pool.max_nodes:
                node = _Node(pool, self.now)
                nodes.append(node)
                room += max(1, _places(pool, waiting[0].stage))
                self._at(pool.start_seconds, "node", node)
            self.result.peak_nodes[name] = max(self.result.peak_nodes[name], len(nodes))
            for node in list(nodes):
                is_idle = node.is_up and not node.actors
                if is_idle and self.now - node.idle_since > pool.idle_seconds:
                    self._release(node)

    def _node_is_up(self, node: _Node) -> None:
        node.is_up, node.idle_since = True, self.now
        node.cpus, node.gpus = node.pool.num_cpus, node.pool.num_gpus
        if node.pool.preemptions_per_hour:
            mean = 3600 / node.pool.preemptions_per_hour
            self._at(self._random.expovariate(1 / mean), "preempt", node)
        for actors in self._actors.values():
            for actor in actors:
                if actor.node is None and actor.stage.nodes == node.pool.name:
                    self._place(actor)

    def _preempt(self, node: _Node) -> None:
        self.result.num_preemptions += 1
        for actor in list(node.actors):
            task = actor.task
            self._end(actor)
            if task is not None:
                self.result.num_lost += 1
                self.board.failed(task, Problem(Kind.PREEMPTED, "the node is gone"), self.now)
        self._release(node)

    def _release(self, node: _Node) -> None:
        self._nodes[node.pool.name].remove(node)
        self.result.node_seconds[node.pool.name] += self.now - node.asked_at

    def _end(self, actor: _Actor) -> None:
        if actor.task is not None:
            self.result.busy_seconds[actor.stage.name] += self.now - actor.since
        actor.is_dead, actor.task = True, None
        self._actors[actor.stage.name].remove(actor)
        node = actor.node
        if node is None:
            return
        node.actors.discard(actor)
        node.cpus += actor.stage.num_cpus
        node.gpus += actor.stage.num_gpus
        node.idle_since = self.now

    # --- shards -------------------------------------------------------------------------------

    def _draw_seconds(self, stage: SimStage, task: Task) -> float:
        luck, mean = self._luck, stage.row_seconds[task.source] * task.num_rows
        drawn = mean * max(0.1, self._random.gauss(1.0, luck.spread))
        if self._random.random() < luck.straggler_share:
            drawn *= luck.straggler_factor
        return drawn

    def _shard_ends(self, actor: _Actor) -> None:
        task = actor.task
        assert task is not None, "only a shard in the making ends"
        seconds = self.now - actor.since
        self.result.busy_seconds[actor.stage.name] += seconds
        actor.task, actor.since = None, self.now
        if self._random.random() < self._luck.failure_share:
            self.board.failed(task, Problem(Kind.SHARD, "drawn to fail"), self.now)
        elif self.board.made(task, self._made(task, seconds)):
            self.result.shards_made[actor.stage.name] += 1

    def _made(self, task: Task, seconds: float) -> Made:
        above = self._above[task.folder]
        inputs = above.done[task.key].sha256 if above is not None else None
        return Made(
            commit=Commit(str(next(self._digests)), inputs, "", task.num_rows),
            counts=Counts(kept=task.num_rows),
            is_new=True,
            num_kept=task.num_rows,
            seconds=seconds,
        )


def _places(pool: SimNodes, stage: SimStage) -> int:
    by_cpu = pool.num_cpus / stage.num_cpus if stage.num_cpus else float("inf")
    by_gpu = pool.num_gpus / stage.num_gpus if stage.num_gpus else float("inf")
    return int(min(by_cpu, by_gpu, 1e9))
