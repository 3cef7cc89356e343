"""URLs in, bytes or one typed reason out: the guarded, patient, polite side of downloading.

The limits are `pipeline.web.config.FetchConfig`, the reasons `pipeline.web.failures`.
"""

import http.client
import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pipeline.web.client import Answer, Client, Clocks
from pipeline.web.config import FetchConfig, RetryPolicy
from pipeline.web.deadline import Deadline
from pipeline.web.failures import FailureReason, FetchError, printable
from pipeline.web.guard import Target
from pipeline.web.robots import forbidding_directive
from pipeline.web.robots_cache import MAX_ROBOTS_BYTES, RobotsCache
from pipeline.web.transport import Resolver, build_tls_context, resolve_with_system

# Transient, but not worth another try now: the time is spent, or we were told so a moment ago.
_NOT_NOW = frozenset(
    {
        FailureReason.TOO_SLOW,
        FailureReason.HOST_BUSY,
        FailureReason.CANCELLED,
        FailureReason.ROBOTS_UNREACHABLE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchResult:
    """What became of one URL: a body, or the reason why there is none."""

    url: str
    """As it was asked for."""
    body: bytes | None = field(default=None, repr=False)
    """Decoded and never empty; None when the URL failed."""
    reason: FailureReason | None = None
    """None when there is a body."""
    detail: str = ""
    """What was seen when it failed, in words."""
    http_status: int | None = None
    """Of the last response of the last attempt; None when there was no response."""
    final_url: str | None = None
    """After redirects, without credentials; None when the URL failed."""
    content_type: str | None = None
    """As the server claims, printable and cut short."""
    attempts: int = 0
    """0 when the URL was refused before anything was sent."""
    elapsed_seconds: float = 0.0
    """From the call to its end, pauses and queueing included."""

    @property
    def is_transient(self) -> bool:
        """Whether it failed for a reason that may pass; `capfilt retry` revisits those."""
        return self.reason is not None and self.reason.is_transient


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a fetcher takes from the machine it runs on; tests bring their own."""

    resolve: Resolver = resolve_with_system
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    """Waits for the event or for so many seconds; returns whether the event came."""
    build_tls_context: Callable[[FetchConfig], ssl.SSLContext] = build_tls_context


class Fetcher:
    """Fetches URLs under one configuration; any number of threads may share it.

    A context manager: leaving it closes idle connections and ends every pause between attempts.
    """

    def __init__(self, config: FetchConfig, *, surroundings: Surroundings | None = None) -> None:
        """Builds the one TLS context that every HTTPS connection uses; connects to nothing."""
        self._config = config
        self._around = surroundings or Surroundings()
        self._is_closing = threading.Event()
        self._client = Client(
            config,
            resolve=self._around.resolve,
            tls_context=self._around.build_tls_context(config),
            clocks=Clocks(monotonic=self._around.clock, wall=self._around.wall_clock),
        )
        self._robots = RobotsCache(config, self._get_robots_txt, self._around.clock)
        self._forbidding = frozenset(config.disallowed_header_directives)

    def fetch(self, url: str) -> FetchResult:
        """Return the bytes at a URL, or the reason why not; never raises for what the web does.

        Transient failures are tried again within `total_seconds`. Safe to repeat.
        """
        started_at = self._around.clock()
        deadline = Deadline(self._config.total_seconds, self._around.clock)
        attempts = 0
        try:
            target = self._client.guard.vet_url(url)
            while True:
                attempts += 1
                try:
                    answer = self._attempt(target, deadline)
                    break
                except FetchError as error:
                    self._pause_or_give_up(url, attempts, error, deadline)
        except FetchError as error:
            return _failed(url, error, attempts, self._around.clock() - started_at)
        return _fetched(url, answer, attempts, self._around.clock() - started_at)

    def close(self) -> None:
        """Close idle connections and end pauses; URLs in flight finish, new ones are cancelled."""
        self._is_closing.set()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _attempt(self, target: Target, deadline: Deadline) -> Answer:
        if self._is_closing.is_set():
            raise FetchError(FailureReason.CANCELLED, "the fetcher is closed")
        return self._client.follow(
            target,
            deadline,
            max_bytes=self._config.max_body_bytes,
            before_request=self._robots.check if self._config.is_robots_txt_honoured else _allow,
            check_head=self._check_robots_header,
        )

    def _pause_or_give_up(
        self, url: str, attempts: int, error: FetchError, deadline: Deadline
    ) -> None:
        """Return when it is time for another attempt; raises FetchError when there is none."""
        policy = self._config.retry
        is_passing = error.reason.is_transient and error.reason not in _NOT_NOW
        if not is_passing or attempts >= policy.max_attempts:
            raise error
        pause = pause_seconds(policy, url, attempts, error.retry_after_seconds)
        if pause is None or pause >= deadline.remaining_seconds:
            raise error
        if self._around.wait(self._is_closing, pause):
            raise FetchError(FailureReason.CANCELLED, f"closed after {error}")

    def _check_robots_header(self, headers: http.client.HTTPMessage) -> None:
        tags = headers.get_all("X-Robots-Tag")
        if tags and self._forbidding:
            token = self._config.user_agent_token
            if found := forbidding_directive(tags, token, self._forbidding):
                raise FetchError(FailureReason.ROBOTS_HEADER, f"X-Robots-Tag: {found}")

    def _get_robots_txt(self, url: str, deadline: Deadline) -> bytes:
        return self._client.follow(
            self._client.guard.vet_url(url),
            deadline,
            max_bytes=MAX_ROBOTS_BYTES,
            before_request=_allow,
            check_head=_ignore,
        ).body


def pause_seconds(
    policy: RetryPolicy, url: str, attempts: int, retry_after_seconds: float | None
) -> float | None:
    """Return how long to wait after the given number of attempts, None for no further attempt.

    Exponential, with a share of jitter that depends on nothing but the URL and the attempt. What
    the server asked for is the least we wait; when it asked for more than the policy's cap,
    coming back earlier would be rude, so the URL is left to a later run.
    """
    if retry_after_seconds is not None and retry_after_seconds > policy.max_retry_after_seconds:
        return None
    grown = policy.base_delay_seconds * policy.backoff_factor ** (attempts - 1)
    longest = min(grown, policy.max_delay_seconds)
    chance = random.Random(f"{attempts} {url}").random()
    pause = longest * (1 - policy.jitter * chance)
    return max(pause, retry_after_seconds or 0.0)


def _allow(target: object, deadline: Deadline) -> None:
    """Ask nobody before a request."""


def _ignore(headers: http.client.HTTPMessage) -> None:
    """Read the body whatever the head says."""


def _failed(url: str, error: FetchError, attempts: int, elapsed_seconds: float) -> FetchResult:
    return FetchResult(
        url=url,
        reason=error.reason,
        detail=error.detail,
        http_status=error.http_status,
        attempts=attempts,
        elapsed_seconds=elapsed_seconds,
    )


def _fetched(url: str, answer: Answer, attempts: int, elapsed_seconds: float) -> FetchResult:
    content_type = answer.headers.get("Content-Type")
    return FetchResult(
        url=url,
        body=answer.body,
        http_status=answer.status,
        final_url=answer.target.url,
        content_type=None if content_type is None else printable(content_type),
        attempts=attempts,
        elapsed_seconds=elapsed_seconds,
    )
