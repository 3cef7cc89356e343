"""What is to be done next: ready shards, shards in flight, attempts, back-pressure, stragglers.

Pure bookkeeping with the clock passed in: the driver asks for work and reports what came of it, in
one process or through Ray, or in a simulation.

A stage's shard becomes ready when the stage above has committed it and its own is missing or was
made from another version (`inputs`). A stage may begin a shard while the next one has not too many
waiting, so what is staged between them is bounded exactly.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from jobs.problems import Kind, Problem
from jobs.stages.stage import Commit, Made, Task

Key = tuple[str, int]
_DURATIONS_KEPT = 512
_HOPELESS = 10  # shards set aside in a row, with none made in between


@dataclass(frozen=True, slots=True)
class Limits:
    """The patience of a board."""

    attempts: int = 3
    max_shards_ahead: int = 16
    straggler_factor: float = 4.0
    straggler_seconds: float = 60.0
    storage_patience_seconds: float = 900.0
    longest_pause_seconds: float = 60.0


@dataclass(slots=True)
class Failure:
    """A shard that was set aside."""

    problem: Problem
    attempts: int


@dataclass(slots=True)
class InFlight:
    """A task that one worker, or two, are at."""

    started_at: float
    copies: int = 1
    num_made_before: int = 0
    """Shards that had been made by all stages when it was begun."""


@dataclass
class StageBoard:
    """One stage's shards and where they stand."""

    name: str
    folder: str
    tasks: Mapping[Key, Task]
    """Every shard there is to be, whether its time has come or not."""
    is_given: bool = False
    """Whether it stands as it is: the run starts below it."""
    done: dict[Key, Commit] = field(default_factory=dict)
    """Those that exist and are not stale."""
    ready: deque[Task] = field(default_factory=deque)
    in_flight: dict[Key, InFlight] = field(default_factory=dict)
    attempts: Counter[Key] = field(default_factory=Counter)
    failures: dict[Key, Failure] = field(default_factory=dict)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_DURATIONS_KEPT))
    num_new: int = 0
    num_failed_in_row: int = 0
    num_rows: int = 0
    """Of the source lists, that this run brought through the stage."""
    num_kept: int = 0
    """Images that this run brought through the stage."""
    num_judged: int = 0
    """Rows of the source lists in the shards that this run made, those that existed left out."""

    @property
    def num_open(self) -> int:
        """Shards that wait for a worker or are with one."""
        return len(self.ready) + len(self.in_flight)


class Board:
    """All stages of a run, upstream first."""

    def __init__(self, stages: Sequence[StageBoard], limits: Limits) -> None:
        """`done` of each stage is what its markers say; what is ready is found here."""
        self.stages = list(stages)
        self.limits = limits
        self.num_made = 0
        self._below = dict(zip([s.name for s in stages], [*stages[1:], None], strict=True))
        self._by_folder = {stage.folder: stage for stage in stages}
        self._pause_until = 0.0
        self._num_pauses = 0
        self._storage_fails_since: float | None = None
        self._fill()

    def _fill(self) -> None:
        above: StageBoard | None = None
        for stage in self.stages:
            if above is not None:
                for key in [key for key in stage.done if self._is_stale(above, stage, key)]:
                    del stage.done[key]
            if not stage.is_given:
                stage.ready.extend(
                    task
                    for key, task in stage.tasks.items()
                    if key not in stage.done and (above is None or key in above.done)
                )
            above = stage

    @staticmethod
    def _is_stale(above: StageBoard, stage: StageBoard, key: Key) -> bool:
        upstream = above.done.get(key)
        return upstream is None or stage.done[key].inputs != upstream.sha256

    @property
    def is_finished(self) -> bool:
        """Whether nothing is ready and nothing is in flight."""
        return not any(stage.num_open for stage in self.stages)

    def is_over(self, stage: StageBoard) -> bool:
        """Whether a stage has no shard left to make, nor will get one."""
        above = self.stages[: self.stages.index(stage)]
        return not stage.num_open and not any(each.num_open for each in above)

    def pause_seconds(self, now: float) -> float:
        """Return how long nothing is to be begun, because storage fails."""
        return max(0.0, self._pause_until - now)

    def can_take(self, stage: StageBoard) -> int:
        """Return how many ready shards a stage may begin, as the next one has room for them."""
        below = self._below[stage.name]
        room = len(stage.ready)
        if below is not None:
            waiting = below.num_open + len(stage.in_flight)
            room = min(room, max(0, self.limits.max_shards_ahead - waiting))
        return room

    def take(self, stage: StageBoard, now: float) -> Task | None:
        """Return the next shard for a worker of a stage, or None when there is none now."""
        if self.pause_seconds(now) or not self.can_take(stage):
            return None
        task = stage.ready.popleft()
        stage.in_flight[task.key] = InFlight(now, num_made_before=self.num_made)
        return task

    def stragglers(self, stage: StageBoard, now: float) -> list[Task]:
        """Return shards that take far too long, the oldest first.

        Only at the end of a stage, when its workers would idle. Begun a second time, whichever copy
        is first commits.
        """
        above = self.stages[: self.stages.index(stage)]
        if stage.ready or any(each.num_open for each in above) or len(stage.seconds) < 3:
            return []
        limit = max(
            self.limits.straggler_seconds, self.limits.straggler_factor * median(stage.seconds)
        )
        late = [
            (each.started_at, key)
            for key, each in stage.in_flight.items()
            if each.copies == 1 and now - each.started_at > limit
        ]
        return [stage.tasks[key] for _, key in sorted(late)]

    def take_straggler(self, stage: StageBoard, now: float) -> Task | None:
        """Return a straggler for a second worker, or None."""
        for task in self.stragglers(stage, now):
            stage.in_flight[task.key].copies += 1
            return task
        return None

    def made(self, task: Task, made: Made) -> bool:
        """Note a shard that exists now; the next stage's becomes ready.

        Returns False if another copy was first.
        """
        stage = self._by_folder[task.folder]
        if stage.in_flight.pop(task.key, None) is None:
            return False
        self.num_made += 1
        self._num_pauses, self._pause_until, self._storage_fails_since = 0, 0.0, None
        stage.num_failed_in_row = 0
        stage.done[task.key] = made.commit
        stage.num_rows += task.num_rows
        if made.is_new:
            stage.num_new += 1
            stage.seconds.append(made.seconds)
            stage.num_judged += task.num_rows
            stage.num_kept += made.num_kept
        self._release(stage, task.key)
        return True

    def _release(self, stage: StageBoard, key: Key) -> None:
        below = self._below[stage.name]
        while below is not None and key in below.tasks:
            if key in below.done and not self._is_stale(stage, below, key):
                stage, below = below, self._below[below.name]
                continue
            below.done.pop(key, None)
            below.ready.append(below.tasks[key])
            return

    def failed(self, task: Task, problem: Problem, now: float) -> bool:
        """Note an attempt that came to nothing; returns whether the shard was set aside for it."""
        stage = self._by_folder[task.folder]
        flight = stage.in_flight.get(task.key)
        if flight is None:
            return False
        flight.copies -= 1
        if flight.copies:
            return False  # the other copy goes on
        del stage.in_flight[task.key]
        is_counted = problem.kind is not Kind.PREEMPTED
        if problem.kind is Kind.STORAGE:
            self._pause(now)
            # An outage is nobody's fault: only a shard that fails while others succeed is suspect.
            is_counted = self.num_made > flight.num_made_before
        stage.attempts[task.key] += is_counted
        if problem.kind is not Kind.BUG and stage.attempts[task.key] < self.limits.attempts:
            stage.ready.append(task)
            return False
        stage.failures[task.key] = Failure(problem, stage.attempts[task.key])
        if problem.kind is not Kind.SHARD:  # bad data comes in runs, and says nothing of the rest
            stage.num_failed_in_row += 1
        return True

    def returned(self, task: Task) -> None:
        """Note that a worker gave a shard back without having been at fault, or at work."""
        stage = self._by_folder[task.folder]
        flight = stage.in_flight.get(task.key)
        if flight is None:
            return
        flight.copies -= 1
        if not flight.copies:
            del stage.in_flight[task.key]
            stage.ready.appendleft(task)

    def _pause(self, now: float) -> None:
        if self._storage_fails_since is None:
            self._storage_fails_since = now
        if not self.pause_seconds(now):  # those that were in flight together count once
            self._num_pauses += 1
            pause = min(0.5 * 2**self._num_pauses, self.limits.longest_pause_seconds)
            self._pause_until = now + pause

    def hopeless(self, now: float) -> str | None:
        """Return why it makes no sense to go on, or None."""
        since = self._storage_fails_since
        if since is not None and now - since > self.limits.storage_patience_seconds:
            return f"storage has failed every request for {now - since:,.0f} s"
        for stage in self.stages:
            if stage.num_failed_in_row >= _HOPELESS:
                return f"{stage.name}: {stage.num_failed_in_row} shards in a row were set aside"
        return None
