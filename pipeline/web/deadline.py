"""How long one URL may still take, shared by everything that waits on its behalf."""

from collections.abc import Callable

from pipeline.web.failures import FailureReason, FetchError


class Deadline:
    """A budget of seconds that starts now; waits are cut to what is left of it."""

    def __init__(self, total_seconds: float, clock: Callable[[], float]) -> None:
        """`clock` counts seconds and never goes back."""
        self._clock = clock
        self._total_seconds = total_seconds
        self._ends_at = clock() + total_seconds

    @property
    def remaining_seconds(self) -> float:
        """What is left; zero or less when the time is over."""
        return self._ends_at - self._clock()

    def cut(self, seconds: float) -> float:
        """Return the shorter of `seconds` and what is left; raises FetchError when nothing is."""
        remaining = self.remaining_seconds
        if remaining <= 0:
            raise self.exceeded()
        return min(seconds, remaining)

    def extend(self, seconds: float) -> None:
        """Give back seconds that were spent queueing and not on the URL."""
        self._ends_at += seconds

    def exceeded(self) -> FetchError:
        """Return the error that says the whole budget is spent."""
        return FetchError(FailureReason.TOO_SLOW, f"not done after {self._total_seconds:g} s")
