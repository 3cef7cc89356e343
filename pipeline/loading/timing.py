"""How long training stands still for its data."""

import time
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True, slots=True)
class LoaderTiming:
    """How long batches were waited for, and in how much time, since it was last taken."""

    num_batches: int
    wait_seconds: float
    elapsed_seconds: float

    @property
    def wait_share(self) -> float:
        """The part of the time in which training stood still for data, 0 to 1."""
        return self.wait_seconds / self.elapsed_seconds if self.elapsed_seconds else 0.0


class WaitClock:
    """Times what happens within it, from the end of the first time on, which starts workers."""

    def __init__(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Forget everything; the next time within is a first one again."""
        self._since: float | None = None
        self._entered = 0.0
        self._waited = 0.0
        self._count = 0

    def take(self) -> LoaderTiming:
        """Return what was measured since the last call, and begin anew."""
        if self._since is None:
            return LoaderTiming(0, 0.0, 0.0)
        now = time.perf_counter()
        timing = LoaderTiming(self._count, self._waited, now - self._since)
        self._since, self._waited, self._count = now, 0.0, 0
        return timing

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._waited += now - self._entered
            self._count += 1
