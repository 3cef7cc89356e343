"""Rows visited by many threads, handed on in their own order, in bounded memory.

One URL may take a minute while thousands after it are done. What is done early waits: the first
megabytes in memory, the rest in a file.
"""

import os
import queue
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.download_row import RowResult
from pipeline.sample import ShardError
from pipeline.sources.rows import MalformedRow, SourceRow
from pipeline.web.failures import FailureReason

_POLL_SECONDS = 0.5  # how often a wait for the web looks whether it should stop


class DownloadStoppedError(Exception):
    """The download was asked to stop, or its fetcher closed: no shard was committed."""


@dataclass(frozen=True, slots=True)
class RowToVisit:
    """A row that is to be fetched or read."""

    key: str
    row: SourceRow | MalformedRow


Step = RowToVisit | RowResult  # a result is passed on in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class CrewLimits:
    """How many threads visit rows, and how far they may run ahead of the slowest."""

    num_threads: int
    max_rows_ahead: int


@dataclass(frozen=True, slots=True)
class _Spilled:
    result: RowResult  # without its members
    offset: int
    sizes: dict[str, int] | None  # of the members, in the file's order


class WaitingRoom:
    """Holds results until their turn: in memory up to a limit, then in the file at `path`."""

    def __init__(self, path: str, max_bytes: int) -> None:
        """Creates the file once it is needed; whoever owns its folder removes it."""
        self._path = path
        self._max_bytes = max_bytes
        self._waiting: dict[int, RowResult | _Spilled] = {}
        self._bytes_in_memory = 0
        self._num_spilled = 0
        self._file: BinaryIO | None = None
        self.next_position = 0
        """Of the row whose turn it is."""

    @property
    def bytes_in_memory(self) -> int:
        """What the samples that wait in memory take."""
        return self._bytes_in_memory

    def put(self, position: int, result: RowResult) -> None:
        """Take in the result of the row at `position`, counted from 0."""
        num_bytes = sum(map(len, (result.members or {}).values()))
        if position != self.next_position and self._bytes_in_memory + num_bytes > self._max_bytes:
            self._waiting[position] = self._spill(result)
            return
        self._waiting[position] = result
        self._bytes_in_memory += num_bytes

    def take(self) -> Iterator[RowResult]:
        """Yield the results whose turn has come."""
        while (waiting := self._waiting.pop(self.next_position, None)) is not None:
            self.next_position += 1
            if isinstance(waiting, _Spilled):
                yield self._unspill(waiting)
            else:
                self._bytes_in_memory -= sum(map(len, (waiting.members or {}).values()))
                yield waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _spill(self, result: RowResult) -> _Spilled:
        if self._file is None:
            self._file = open(self._path, "w+b")  # noqa: SIM115 - open as long as the room is
        self._num_spilled += 1
        offset = self._file.seek(0, os.SEEK_END)
        if result.members is None:
            return _Spilled(result, offset, None)
        for data in result.members.values():
            self._file.write(data)
        sizes = {extension: len(data) for extension, data in result.members.items()}
        return _Spilled(replace(result, members=None), offset, sizes)

    def _unspill(self, spilled: _Spilled) -> RowResult:
        assert self._file is not None, "something was spilled"
        result = spilled.result
        if spilled.sizes is not None:
            self._file.seek(spilled.offset)
            members = {name: self._file.read(size) for name, size in spilled.sizes.items()}
            result = replace(result, members=members)
        self._num_spilled -= 1
        if not self._num_spilled:
            self._file.truncate(0)
        return result


class Crew:
    """Visits rows with threads, and yields what became of them in the order they came."""

    def __init__(
        self,
        visit: Callable[[str, SourceRow | MalformedRow], RowResult],
        limits: CrewLimits,
        room: WaitingRoom,
        should_stop: Callable[[], bool],
    ) -> None:
        """`should_stop` is asked between rows."""
        self._visit = visit
        self._limits = limits
        self._room = room
        self._should_stop = should_stop
        self._done: queue.SimpleQueue[tuple[int, RowResult | ShardError]] = queue.SimpleQueue()
        self._num_in_flight = 0

    def work(
        self, steps: Iterator[Step], on_row: Callable[[RowResult], None]
    ) -> Generator[RowResult, None, None]:
        """Yield one result per step, in order; `on_row` hears of each as soon as it is there.

        Raises DownloadStoppedError, and ShardError when a visit raised what it should not. Either
        way, and when the caller stops iterating, URLs in flight are waited for and no others begun.
        """
        pool = ThreadPoolExecutor(self._limits.num_threads, thread_name_prefix="visit")
        try:
            for position, step in enumerate(steps):
                while self._is_too_far_ahead(position):
                    self._collect(on_row)
                    yield from self._room.take()
                if isinstance(step, RowResult):
                    self._room.put(position, step)
                    yield from self._room.take()
                else:
                    self._num_in_flight += 1
                    pool.submit(self._visit_and_tell, position, step)
            while self._num_in_flight:
                self._collect(on_row)
                yield from self._room.take()
        finally:
            pool.shutdown(cancel_futures=True)

    def _is_too_far_ahead(self, position: int) -> bool:
        if self._should_stop():
            raise DownloadStoppedError("asked to stop")
        return self._num_in_flight > 0 and (
            self._num_in_flight >= 2 * self._limits.num_threads
            or position - self._room.next_position >= self._limits.max_rows_ahead
        )

    def _visit_and_tell(self, position: int, step: RowToVisit) -> None:
        try:
            self._done.put((position, self._visit(step.key, step.row)))
        except Exception as error:  # a bug: raised again, with its cause, where rows are collected
            url = step.row.url if isinstance(step.row, SourceRow) else step.row.file
            failure = ShardError(f"sample {step.key}, {url}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._done.put((position, failure))

    def _collect(self, on_row: Callable[[RowResult], None]) -> None:
        """Wait for one visited row and let it into the waiting room."""
        while True:
            if self._should_stop():
                raise DownloadStoppedError("asked to stop")
            try:
                position, result = self._done.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                continue
        self._num_in_flight -= 1
        if isinstance(result, ShardError):
            raise result
        if result.reason == FailureReason.CANCELLED:
            # Says nothing about the row: it must not stand in a ledger.
            raise DownloadStoppedError("the fetcher was closed")
        on_row(result)
        self._room.put(position, result)
