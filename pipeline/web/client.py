"""GETs to vetted targets, every redirect vetted again; no retries, no opinion on robots."""

import email.utils
import http.client
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC

from pipeline.web.body import read_body
from pipeline.web.config import FetchConfig
from pipeline.web.deadline import Deadline
from pipeline.web.failures import FailureReason, FetchError, reason_for_status
from pipeline.web.guard import Guard, Target, redirect_url
from pipeline.web.hosts import HostSlots, IdleConnections
from pipeline.web.transport import Connection, Connector, Resolver, failures_of_the_way

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_DRAIN_BYTES = 65536  # reading a short error page is cheaper than a new connection

BeforeRequest = Callable[[Target, Deadline], None]
HeadCheck = Callable[[http.client.HTTPMessage], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response with status 2xx, or a redirect, whose body is then empty."""

    target: Target
    status: int
    headers: http.client.HTTPMessage
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """The two clocks a fetch reads: seconds that never go back, and seconds since 1970."""

    monotonic: Callable[[], float]
    wall: Callable[[], float]


class Client:
    """Sends GETs through the guard; threads may share it."""

    def __init__(
        self, config: FetchConfig, *, resolve: Resolver, tls_context: ssl.SSLContext, clocks: Clocks
    ) -> None:
        """Opens nothing yet."""
        self._config = config
        self._clocks = clocks
        self.guard = Guard(config)
        self._connector = Connector(config, self.guard, resolve, tls_context)
        self._slots = HostSlots(config.max_connections_per_host)
        self._idle = IdleConnections(config.max_idle_connections, clocks.monotonic)
        self._headers = {
            "User-Agent": config.user_agent,
            "Accept": "image/*, */*;q=0.5",
            "Accept-Encoding": "identity",
        }

    def follow(
        self,
        target: Target,
        deadline: Deadline,
        *,
        max_bytes: int,
        before_request: BeforeRequest,
        check_head: HeadCheck,
    ) -> Answer:
        """Return the 2xx answer at the end of the redirects; raises FetchError.

        `before_request` is asked before each request and `check_head` before each body is read;
        both refuse by raising FetchError.
        """
        seen = {target.url}
        for _ in range(self._config.max_redirects + 1):
            before_request(target, deadline)
            answer = self._get(target, deadline, max_bytes, check_head)
            if answer.status not in _REDIRECTS:
                return answer
            target = self._next_target(answer)
            if target.url in seen:
                raise FetchError(FailureReason.REDIRECT_LOOP, target.url, http_status=answer.status)
            seen.add(target.url)
        raise FetchError(
            FailureReason.TOO_MANY_REDIRECTS,
            f"over {self._config.max_redirects}",
            http_status=answer.status,
        )

    def close(self) -> None:
        """Close the idle connections; requests in flight end by themselves."""
        self._idle.close()

    def _next_target(self, answer: Answer) -> Target:
        location = answer.headers.get("Location")
        try:
            if not location:
                raise FetchError(FailureReason.BAD_REDIRECT, "no Location")
            return self.guard.vet_url(redirect_url(answer.target, location))
        except FetchError as error:
            error.http_status = answer.status
            raise

    def _get(
        self, target: Target, deadline: Deadline, max_bytes: int, check_head: HeadCheck
    ) -> Answer:
        queued_at = self._clocks.monotonic()
        with self._slots.hold(target.host, timeout_seconds=self._config.max_host_wait_seconds):
            deadline.extend(self._clocks.monotonic() - queued_at)
            connection, response = self._send(target, deadline)
            is_reusable = False
            try:
                body = self._judge_and_read(response, deadline, max_bytes, check_head)
                is_reusable = response.isclosed() and not response.will_close
            except FetchError as error:
                error.http_status = response.status
                is_reusable = response.isclosed() and not response.will_close
                raise
            finally:
                response.close()
                if is_reusable:
                    self._idle.give(connection)
                else:
                    connection.close()
        return Answer(target, response.status, response.headers, body)

    def _send(
        self, target: Target, deadline: Deadline
    ) -> tuple[Connection, http.client.HTTPResponse]:
        idle = self._idle.take(target.origin)
        if idle is not None:
            try:
                return idle, idle.exchange(target, self._headers, deadline)
            except FetchError as error:
                idle.close()
                # Servers close idle connections at any moment, and what an earlier answer left in
                # one is not this URL's fault: only lost time counts as an attempt.
                if error.reason in (FailureReason.TIMEOUT, FailureReason.TOO_SLOW):
                    raise
        connection = self._connector.open(target, deadline)
        try:
            return connection, connection.exchange(target, self._headers, deadline)
        except BaseException:
            connection.close()
            raise

    def _judge_and_read(
        self,
        response: http.client.HTTPResponse,
        deadline: Deadline,
        max_bytes: int,
        check_head: HeadCheck,
    ) -> bytes:
        if 200 <= response.status < 300:
            check_head(response.headers)
            return read_body(response, deadline, max_bytes=max_bytes)
        if response.length is not None and response.length <= _MAX_DRAIN_BYTES:
            with failures_of_the_way(deadline):
                response.read()
        if response.status in _REDIRECTS:
            return b""
        raise FetchError(
            reason_for_status(response.status),
            f"HTTP {response.status} {response.reason[:80]}".rstrip(),
            retry_after_seconds=self._retry_after(response.headers.get("Retry-After")),
        )

    def _retry_after(self, value: str | None) -> float | None:
        if value is None:
            return None
        if value.strip().isdecimal() and value.isascii():
            return float(value[:12])
        try:
            at = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        return max(0.0, at.timestamp() - self._clocks.wall())
