"""What the threads that fetch share: the slots of each host and its idle connections."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.web.failures import FailureReason, FetchError
from pipeline.web.transport import Connection

IDLE_SECONDS = 15.0  # servers commonly close after 5 to 75


@dataclass(slots=True)
class _Slots:
    free: threading.Semaphore
    num_users: int = 0


class HostSlots:
    """Lets only so many threads use a host at once.

    A thread holds one slot at a time and every holder is under a deadline, so no cycle of waits
    can form and every wait ends.
    """

    def __init__(self, slots_per_host: int) -> None:
        """Memory is kept only for hosts that are in use."""
        self._slots_per_host = slots_per_host
        self._lock = threading.Lock()
        self._hosts: dict[str, _Slots] = {}

    @contextmanager
    def hold(self, host: str, *, timeout_seconds: float) -> Iterator[None]:
        """Hold one of the host's slots; raises FetchError when none came free in time."""
        with self._lock:
            slots = self._hosts.get(host)
            if slots is None:
                slots = self._hosts[host] = _Slots(threading.Semaphore(self._slots_per_host))
            slots.num_users += 1
        try:
            if not slots.free.acquire(timeout=timeout_seconds):
                raise FetchError(
                    FailureReason.HOST_BUSY, f"no slot for {host} in {timeout_seconds:g} s"
                )
            try:
                yield
            finally:
                slots.free.release()
        finally:
            with self._lock:
                slots.num_users -= 1
                if not slots.num_users:
                    del self._hosts[host]


class IdleConnections:
    """Connections kept for the next request to the same origin; the oldest give way."""

    def __init__(self, max_idle: int, clock: Callable[[], float]) -> None:
        """`max_idle` bounds the file descriptors held over all origins."""
        self._max_idle = max_idle
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: OrderedDict[Connection, float] = OrderedDict()  # oldest first
        self._is_closed = False

    def take(self, origin: tuple[str, str, int]) -> Connection | None:
        """Return the origin's latest idle connection that is still open, or None."""
        while True:
            with self._lock:
                found = next((c for c in reversed(self._idle) if c.origin == origin), None)
                if found is None:
                    return None
                since = self._idle.pop(found)
            if self._clock() - since < IDLE_SECONDS and found.is_quiet:
                return found
            found.close()

    def give(self, connection: Connection) -> None:
        """Keep a connection whose response was read to its end."""
        with self._lock:
            self._idle[connection] = self._clock()
            num_kept = 0 if self._is_closed else self._max_idle
            evicted = [self._idle.popitem(last=False)[0] for _ in range(len(self._idle) - num_kept)]
        for old in evicted:
            old.close()

    def close(self) -> None:
        """Close what is idle now, and what is given back later."""
        with self._lock:
            self._is_closed = True
            connections = list(self._idle)
            self._idle.clear()
        for connection in connections:
            connection.close()
