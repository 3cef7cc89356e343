"""A run on Ray: actors, one `ray.wait` loop, and nothing that a crash could not do without.

The driver holds no state of its own: what exists is in the corpus, what is to be done is on the
board, and whatever is lost with an actor, a node or the driver itself is found missing and made
again.
"""

import logging
import time
from collections.abc import Sequence

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from jobs import health
from jobs.actors import ActorPool, NotOpened, Opened, Ref, Worker
from jobs.board import Board, StageBoard
from jobs.errors import RunError, UserError
from jobs.pools import Bounds, bounds_of, resources_of, wanted_actors
from jobs.problems import Kind, Problem
from jobs.ray_start import RayPlace, draining_nodes
from jobs.run_config import RunConfig
from jobs.stages.stage import Made, Stage
from jobs.watching import Watching

_log = logging.getLogger(__name__)
_TICK_SECONDS = 0.5
_SECONDS_BETWEEN_LOOKS = 2.0  # for nodes that have announced their end
_MAX_STILLBORN = 5
_MAX_MESSAGE_CHARS = 300


def work_on_ray(
    stages: Sequence[Stage], board: Board, watching: Watching, config: RunConfig, place: RayPlace
) -> None:
    """Make every shard that can be made, until done or asked to stop.

    Raises UserError where a stage cannot be opened, and RunError where it makes no sense to go on.
    Actors are gone when it returns or raises.
    """
    driver = _Driver(stages, board, watching, config, place)
    try:
        while not board.is_finished:
            if watching.wants_to_stop():
                driver.drain(config.drain_seconds)
                watching.is_stopped = True
                break
            why = board.hopeless(watching.clock())
            if why is not None:
                raise RunError(why)
            driver.hand_out()
            driver.collect()
    finally:
        driver.end()


class _Driver:
    """The pools of all stages, and what comes back from them."""

    def __init__(
        self,
        stages: Sequence[Stage],
        board: Board,
        watching: Watching,
        config: RunConfig,
        place: RayPlace,
    ) -> None:
        self._board = board
        self._watching = watching
        self._boards = {each.name: each for each in board.stages}
        self._bounds: dict[str, Bounds] = {}
        self._draining = draining_nodes()
        self._looked_at = watching.clock()
        self._pools: dict[str, ActorPool] = {}
        for stage in stages:
            resources = resources_of(
                config, stage.name, has_gpus=place.has_gpus, is_own=place.is_own
            )
            self._bounds[stage.name] = bounds_of(config, stage.name)
            self._pools[stage.name] = ActorPool(stage, resources, config.idle_seconds)

    def hand_out(self) -> None:
        """Fit every pool to its work, and give its idle actors shards; downstream first."""
        now = self._watching.clock()
        for name, pool in reversed(self._pools.items()):
            stage = self._boards[name]
            wanted = wanted_actors(self._board, stage, self._bounds[name], now)
            pool.resize(wanted, is_over=self._board.is_over(stage))
            for worker in pool.idle:
                if self._is_on_doomed_node(worker):
                    pool.bury(worker)
                    continue
                task = self._board.take(stage, now) or self._board.take_straggler(stage, now)
                if task is None:
                    break
                pool.give(worker, task)

    def _is_on_doomed_node(self, worker: Worker) -> bool:
        now = self._watching.clock()
        if now - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            self._looked_at, self._draining = now, draining_nodes()
        return worker.opened is not None and worker.opened.node in self._draining

    def collect(self, seconds: float = _TICK_SECONDS) -> None:
        """Wait until something comes back, and note whatever has."""
        at_work = self._at_work()
        if not at_work:
            time.sleep(min(seconds, 0.2))  # storage rests, or every actor has just died
        else:
            refs = list(at_work)
            ray.wait(refs, num_returns=1, timeout=seconds)
            come_back, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for ref in come_back:
                pool, worker = at_work[ref]
                self._take_back(pool, worker, ref)
        self._account()

    def drain(self, seconds: float) -> None:
        """Let shards in flight finish, for a while; nothing new is begun."""
        deadline = self._watching.clock() + seconds
        if num_busy := self._num_busy():
            _log.warning(
                "stopping: %d shards in flight may finish, for up to %.0f s; asked again, it ends "
                "at once and they are made by the next run",
                num_busy,
                seconds,
            )
        while self._num_busy():
            if self._watching.clock() >= deadline:
                break
            self.collect()

    def _num_busy(self) -> int:
        pools = self._pools.values()
        return sum(worker.task is not None for pool in pools for worker in pool.workers)

    def end(self) -> None:
        """End every actor; what one was making is not committed, or was."""
        for pool in self._pools.values():
            for worker in list(pool.workers):
                if worker.task is not None:
                    self._board.returned(worker.task)
                pool.bury(worker)
        self._account()

    def _at_work(self) -> dict[Ref, tuple[ActorPool, Worker]]:
        return {
            worker.ref: (pool, worker)
            for pool in self._pools.values()
            for worker in pool.workers
            if worker.ref is not None
        }

    def _take_back(self, pool: ActorPool, worker: Worker, ref: Ref) -> None:
        try:
            result = ray.get(ref)
        except RayTaskError as error:  # the actor lives, and met what it does not even return
            result = Problem(Kind.BUG, str(error.cause or error), str(error))
        except RayError as error:
            result = _death(error)
        task = worker.task
        if task is None:
            self._take_opened(pool, worker, result)
            return
        pool.rest(worker)
        if isinstance(result, Made):
            if self._board.made(task, result):
                self._watching.made(pool.stage.name, task, result)
            return
        if result.kind is Kind.USER:
            self._board.returned(task)
            raise UserError(result.message)
        if result.kind in (Kind.DEATH, Kind.PREEMPTED):
            pool.bury(worker)
        is_set_aside = self._board.failed(task, result, self._watching.clock())
        self._watching.failed(pool.stage.name, task, result, is_set_aside=is_set_aside)

    def _take_opened(
        self, pool: ActorPool, worker: Worker, result: Opened | NotOpened | Problem
    ) -> None:
        if isinstance(result, Opened):
            worker.opened = result
            pool.num_stillborn = 0
            pool.rest(worker)
            return
        pool.bury(worker)
        # An actor may be placed on a node that has just died, or run out of memory while it loads:
        # the next one may do better, but not for ever.
        pool.num_stillborn += 1
        problem = result.problem if isinstance(result, NotOpened) else result
        if problem.kind is Kind.USER:
            raise UserError(problem.message)
        if pool.num_stillborn >= _MAX_STILLBORN or problem.kind is Kind.BUG:
            raise RunError(
                f"{pool.stage.name}: its workers cannot start: {problem.trace or problem.message}"
            )

    def _account(self) -> None:
        for name, pool in self._pools.items():
            account = self._watching.accounts[name]
            account.num_actors = pool.num_open
            account.busy_seconds = pool.busy_seconds
            account.wait_seconds = pool.wait_seconds
        self._warn()
        self._watching.tell()

    def _warn(self) -> None:
        names = list(self._pools)
        for above, name in zip([None, *names], names, strict=False):
            pool, stage = self._pools[name], self._boards[name]
            if above is not None and pool.resources.num_gpus and pool.num_open:
                num_ready = len(stage.ready)
                busy, wait = pool.busy_seconds, pool.wait_seconds
                self._watching.warn(
                    health.starved(name, above, num_ready=num_ready, busy=busy, wait=wait)
                )
                in_shards = self._watching.accounts[name].times["wait"]
                self._watching.warn(health.decoding(name, waits=in_shards, busy=busy))
            self._watching.warn(_unplaced(pool, stage, self._watching.clock()))


def _unplaced(pool: ActorPool, stage: StageBoard, now: float) -> str | None:
    if not stage.ready or pool.num_open or not pool.workers:
        return None
    wants = [f"{pool.resources.num_cpus:g} CPUs", f"{pool.resources.num_gpus:g} GPUs"]
    wants += [f"{amount:g} {name}" for name, amount in pool.resources.custom.items()]
    seconds = now - min(worker.born_at for worker in pool.workers)
    return health.unplaced(stage.name, seconds=seconds, wants=", ".join(wants))


def _death(error: RayError) -> Problem:
    is_preempted = isinstance(error, RayActorError) and error.preempted
    message = " ".join(str(error).split())[:_MAX_MESSAGE_CHARS]
    return Problem(
        Kind.PREEMPTED if is_preempted else Kind.DEATH,
        f"the worker died while making it: {message}",
    )
