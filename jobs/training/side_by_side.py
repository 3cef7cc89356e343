"""Trainings that do not need each other, a few at a time, each in a process of its own.

Models too small to keep a machine busy are trained sooner so: two processes share nothing, two
threads of one share each small sum. A training comes out as it does alone, to the bit, with as many
threads; they share those of this process.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TextIO, TypeVar

import torch

from jobs.errors import RunError, UserError

T = TypeVar("T")
ShouldStop = Callable[[], bool]
Task = Callable[[ShouldStop], T | None]  # None: it was stopped first

_TICK_SECONDS = 0.2  # between two looks at whether to stop
# With more tasks than processors each gets half as much again as the next one. So the first, which
# may have most to do, does not work on alone when the others have ended.
_NICER, _NICEST = 2, 10


def side_by_side(
    tasks: Mapping[str, Task[T]], num_at_once: int, should_stop: ShouldStop
) -> list[T] | None:
    """Return what each task returns, in order; None when stopped before all were done.

    Tasks are named for whoever watches. With more than one at a time they travel to other
    processes, as partials of a module's functions do, and those named first have the right of way.
    Where one fails the others stop, each keeping what it has; then UserError or RunError is raised
    as it was there, and RunError for a process that was killed.
    """
    if min(num_at_once, len(tasks)) == 1:
        return _one_by_one(tasks.values(), should_stop)
    outcomes = _outcomes(tasks, num_at_once, should_stop)
    for outcome in outcomes.values():
        if isinstance(outcome, _Failure):
            outcome.throw()
    results = [outcomes.get(name) for name in tasks]
    done: list[T] = [each for each in results if each is not None]
    return done if len(done) == len(tasks) else None


def _one_by_one(tasks: Iterable[Task[T]], should_stop: ShouldStop) -> list[T] | None:
    results = []
    for task in tasks:
        result = None if should_stop() else task(should_stop)
        if result is None:
            return None
        results.append(result)
    return results


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error of another process in words: not every error survives the way from there."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        """Tell what a person can mend in a sentence, anything else with its trace."""
        if isinstance(error, UserError):
            return cls("user", str(error))
        if isinstance(error, RunError | OSError):
            return cls("run", str(error))
        return cls("bug", traceback.format_exc())

    def throw(self) -> None:
        """Raise it here."""
        kinds = {"user": UserError, "run": RunError, "bug": RuntimeError}
        raise kinds[self.kind](self.text)


# In this process. (concurrent.futures may overlook that a process died which it had just started.)


@dataclass(frozen=True, slots=True)
class _Running:
    """A task in a process of its own."""

    name: str
    process: SpawnProcess
    connection: "Connection[Any, Any]"

    @classmethod
    def start(cls, name: str, task: Task[Any], *, niceness: int, num_threads: int) -> "_Running":
        spawned = multiprocessing.get_context("spawn")
        ours, theirs = spawned.Pipe()
        arguments = (name, task, theirs, niceness, num_threads)
        process = spawned.Process(target=_work, args=arguments, name=name)
        process.start()
        theirs.close()  # so that ours ends with the process
        return cls(name, process, ours)

    def ask_to_stop(self) -> None:
        """Let the task end as soon as it can; safe to repeat."""
        try:
            self.connection.send(None)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has ended: its outcome, or the lack of one, tells how

    def outcome(self) -> Any:  # noqa: ANN401 (the task's own)
        """Return what the task returned, or its failure; waits for the process to end."""
        try:
            found = self.connection.recv()
        except (EOFError, ConnectionResetError):
            found = _Failure(
                "run",
                f"the process that trained {self.name} was killed, by want of memory or by "
                "somebody; give the same command again: it goes on from its last checkpoint. With "
                "--set training.num_at_once=1 trainings take turns, and less memory",
            )
        self.process.join()
        return found


def _outcomes(
    tasks: Mapping[str, Task[T]], num_at_once: int, should_stop: ShouldStop
) -> dict[str, Any]:
    """Return what became of each task that was begun, in the order in which they ended."""
    num_threads = max(1, torch.get_num_threads() // num_at_once)
    niceness = {name: min(_NICER * place, _NICEST) for place, name in enumerate(tasks)}
    waiting, running = list(tasks.items()), list[_Running]()
    outcomes: dict[str, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                name, task = waiting.pop(0)
                running.append(
                    _Running.start(name, task, niceness=niceness[name], num_threads=num_threads)
                )
            for each in _ended(running):
                running.remove(each)
                outcomes[each.name] = each.outcome()
            failed = any(each is None or isinstance(each, _Failure) for each in outcomes.values())
            if failed or should_stop():
                waiting.clear()
                for each in running:
                    each.ask_to_stop()
    finally:
        for each in running:  # whatever went wrong here, none trains on
            each.ask_to_stop()
        for each in running:
            each.process.join()
    return outcomes


def _ended(running: Sequence[_Running]) -> list[_Running]:
    """Return those that have an outcome, after a moment at most."""
    ready = wait([each.connection for each in running], timeout=_TICK_SECONDS)
    return [each for each in running if each.connection in ready]


# In the other processes


def _work(
    name: str,
    task: Task[T],
    parent: "Connection[Any, Any]",
    niceness: int,
    num_threads: int,
) -> None:
    """Do a task; the parent says when to stop, and its end is the end of this process."""
    os.nice(niceness)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # they may reach all at once: the parent tells when
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    with _named(name, sys.stderr):
        try:
            outcome: T | _Failure | None = task(parent.poll)
        except Exception as error:  # it is raised again where somebody can see it
            outcome = _Failure.of(error)
    parent.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: whoever comes next must find nobody at work


@contextmanager
def _named(name: str, stream: TextIO) -> Iterator[None]:
    """Begin each line written to stderr by who writes it: several do."""
    with redirect_stderr(_NamedLines(name, stream)):
        yield


class _NamedLines(io.TextIOBase):
    """Passes whole lines on; no terminal, so that progress comes in lines."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name, self._stream, self._begun = name, stream, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            is_named = line.startswith(f"{self._name}:")
            self._stream.write(f"{line}\n" if is_named else f"{self._name}: {line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
