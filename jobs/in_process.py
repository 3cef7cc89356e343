"""A run in one process: one shard after the other, without Ray.

A shard goes as far down the stages as it can before the next one is begun, so little is staged.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from jobs.board import Board, StageBoard
from jobs.errors import RunError
from jobs.problems import Kind, problem_of
from jobs.stages.stage import Live, Maker, Stage, StoppedError, Task
from jobs.watching import Watching

_LONGEST_NAP_SECONDS = 0.2


def work_in_process(stages: Sequence[Stage], board: Board, watching: Watching) -> None:
    """Make every shard that can be made, until done or asked to stop.

    Raises UserError where a stage cannot be opened, OSError for what this machine refuses (a full
    disk), and RunError where it makes no sense to go on.
    """
    with ExitStack() as opened:
        worker = _Worker({stage.name: stage for stage in stages}, board, watching, opened)
        while not board.is_finished and not watching.is_stopped:
            if watching.wants_to_stop():
                watching.is_stopped = True
                break
            why = board.hopeless(watching.clock())
            if why is not None:
                raise RunError(why)
            worker.work_on_next()


class _Worker:
    """The one worker there is."""

    def __init__(
        self, stages: dict[str, Stage], board: Board, watching: Watching, opened: ExitStack
    ) -> None:
        self._stages = stages
        self._board = board
        self._watching = watching
        self._opened = opened
        self._makers: dict[str, Maker] = {}

    def work_on_next(self) -> None:
        """Make one shard of the stage furthest down that has one ready, or pass a moment."""
        now = self._watching.clock()
        for stage in reversed(self._board.stages):
            task = self._board.take(stage, now)
            if task is not None:
                self._make(stage, task)
                return
        time.sleep(min(_LONGEST_NAP_SECONDS, self._board.pause_seconds(now)))  # storage rests

    def _make(self, stage: StageBoard, task: Task) -> None:
        watching, started_at = self._watching, self._watching.clock()
        account = watching.accounts[stage.name]
        try:
            made = self._maker(stage.name).make(task)
        except StoppedError:
            self._board.returned(task)
            watching.dropped_live(stage.name)
            watching.is_stopped = True
        except Exception as error:  # sorted, counted and shown
            problem = problem_of(error)
            if problem.kind in (Kind.MACHINE, Kind.USER):
                raise
            is_set_aside = self._board.failed(task, problem, watching.clock())
            watching.failed(stage.name, task, problem, is_set_aside=is_set_aside)
        else:
            made = made.timed(watching.clock() - started_at)
            self._board.made(task, made)
            watching.made(stage.name, task, made)
        account.busy_seconds += watching.clock() - started_at

    def _maker(self, name: str) -> Maker:
        if name not in self._makers:
            live = Live(
                on_rows=lambda done, kept: self._watching.rows(name, done, kept),
                should_stop=self._watching.wants_to_stop,
            )
            started_at = self._watching.clock()
            self._makers[name] = self._opened.enter_context(self._stages[name].open(live))
            account = self._watching.accounts[name]
            account.num_actors = 1
            account.wait_seconds += self._watching.clock() - started_at
        return self._makers[name]
