"""One connection to a vetted address, and what is read from it: every wait and every byte capped.

http.client parses; this module decides where it is connected, and what its reads may cost.
"""

import http.client
import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.web.config import FetchConfig
from pipeline.web.deadline import Deadline
from pipeline.web.failures import FailureReason, FetchError
from pipeline.web.guard import Address, Guard, Target

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Resolver = Callable[[str, int], Sequence[str]]
READ_BYTES = 65536


def resolve_with_system(host: str, port: int) -> Sequence[str]:
    """Return the addresses that the system's resolver gives for a name, in its order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


def build_tls_context(config: FetchConfig) -> ssl.SSLContext:
    """Return a verifying context; loading the authorities costs tens of ms, so share it."""
    context = ssl.create_default_context()
    if config.ca_file is not None:
        context.load_verify_locations(config.ca_file)
    return context


@contextmanager
def failures_of_the_way(deadline: Deadline) -> Iterator[None]:
    """Turn what sockets, TLS and http.client raise into one FetchError with its reason."""
    try:
        yield
    except TimeoutError as error:
        if deadline.remaining_seconds <= 0:
            raise deadline.exceeded() from error
        raise FetchError(FailureReason.TIMEOUT, "no answer in time") from error
    # http.client raises ValueError on sizes that no server should send
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(_reason_of(error), repr(error)[:200]) from error


_REASONS: tuple[tuple[type[Exception], FailureReason], ...] = (
    (ssl.SSLEOFError, FailureReason.CONNECTION_RESET),
    (ssl.SSLError, FailureReason.TLS_FAILURE),
    (ConnectionError, FailureReason.CONNECTION_RESET),
    (OSError, FailureReason.CONNECT_FAILURE),
    (http.client.IncompleteRead, FailureReason.TRUNCATED_BODY),
    (http.client.LineTooLong, FailureReason.HEADERS_TOO_LARGE),
)


def _reason_of(error: Exception) -> FailureReason:
    if str(error).startswith("got more than"):  # http.client's words for too many headers
        return FailureReason.HEADERS_TOO_LARGE
    reasons = (reason for kind, reason in _REASONS if isinstance(error, kind))
    return next(reasons, FailureReason.BAD_RESPONSE)


@dataclass(frozen=True, slots=True)
class _Limits:
    timeout_seconds: float
    header_bytes: int
    chunk_line_bytes: int
    wire_bytes: int


class _Wire(io.RawIOBase):
    """Bytes as they arrive, each wait cut to the deadline, all of them counted."""

    def __init__(self, sock: socket.socket, deadline: Deadline, limits: _Limits) -> None:
        self._sock = sock
        self._deadline = deadline
        self._limits = limits
        self._num_received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        self._sock.settimeout(self._deadline.cut(self._limits.timeout_seconds))
        num_bytes = self._sock.recv_into(buffer)
        self._num_received += num_bytes
        if self._num_received > self._limits.wire_bytes:
            raise FetchError(
                FailureReason.BODY_TOO_LARGE, f"over {self._limits.wire_bytes} bytes on the wire"
            )
        return num_bytes


class _Stream(io.BufferedReader):
    """What http.client reads a response from; counts the bytes of its lines."""

    def __init__(self, wire: _Wire, limits: _Limits) -> None:
        super().__init__(wire, READ_BYTES)
        self._what = "headers"
        self._reason = FailureReason.HEADERS_TOO_LARGE
        self._max_line_bytes = limits.header_bytes
        self._num_line_bytes = 0
        self._chunk_line_bytes = limits.chunk_line_bytes

    def begin_body(self) -> None:
        """Count from here on: chunk sizes and trailers are lines too."""
        self._what, self._reason = "chunk sizes", FailureReason.BODY_TOO_LARGE
        self._max_line_bytes, self._num_line_bytes = self._chunk_line_bytes, 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self._num_line_bytes += len(line)
        if self._num_line_bytes > self._max_line_bytes:
            raise FetchError(self._reason, f"over {self._max_line_bytes} bytes of {self._what}")
        return line


class _BoundSocket:
    """The part of a socket that http.client uses, bound to the deadline of the URL in hand."""

    def __init__(self, sock: socket.socket, limits: _Limits) -> None:
        self.raw = sock
        self.limits = limits
        self.deadline: Deadline | None = None
        self.stream: _Stream | None = None

    def sendall(self, data: bytes) -> None:
        assert self.deadline is not None, "a request is sent only inside exchange()"
        self.raw.settimeout(self.deadline.cut(self.limits.timeout_seconds))
        self.raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", mode
        assert self.deadline is not None, "a response is read only inside exchange()"
        self.stream = _Stream(_Wire(self.raw, self.deadline, self.limits), self.limits)
        return self.stream

    def close(self) -> None:
        """http.client closes before the body is read; the connection's owner closes for real."""


class Connection:
    """A TCP or TLS connection to a vetted address; carries one exchange after another."""

    def __init__(self, sock: socket.socket, target: Target, limits: _Limits) -> None:
        """Owns `sock` from here on."""
        self.origin = target.origin
        self._socket = _BoundSocket(sock, limits)

    def exchange(
        self, target: Target, headers: dict[str, str], deadline: Deadline
    ) -> http.client.HTTPResponse:
        """Send a GET and return the response with its head read and its body not.

        Raises FetchError; the connection must then be closed.
        """
        assert target.origin == self.origin, (target, self.origin)
        self._socket.deadline = deadline
        http_connection = http.client.HTTPConnection(target.host, target.port)
        http_connection.auto_open = 0  # it must never connect by itself, to a name it looks up
        http_connection.sock = self._socket
        with failures_of_the_way(deadline):
            http_connection.request(
                "GET", target.path, headers={"Host": target.host_header, **headers}
            )
            response = http_connection.getresponse()
        assert self._socket.stream is not None
        self._socket.stream.begin_body()
        return response

    @property
    def is_quiet(self) -> bool:
        """Whether an idle connection can take a request: open, and nothing unasked in it."""
        try:
            self._socket.raw.settimeout(0)
            self._socket.raw.recv(1)  # a byte nobody asked for, or the end: either way unfit
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close the socket; harmless when it is closed already."""
        self._socket.raw.close()


class Connector:
    """Resolves once, lets the guard judge all of the answer, connects to exactly that."""

    def __init__(
        self, config: FetchConfig, guard: Guard, resolve: Resolver, tls_context: ssl.SSLContext
    ) -> None:
        """`tls_context` is shared by every HTTPS connection."""
        self._guard = guard
        self._resolve = resolve
        self._tls_context = tls_context
        self._limits = _Limits(
            timeout_seconds=config.timeout_seconds,
            header_bytes=config.max_header_bytes,
            # A body in chunks of one byte costs us far more than it costs the server.
            chunk_line_bytes=config.max_header_bytes + config.max_body_bytes // 16,
            wire_bytes=2 * (config.max_header_bytes + config.max_body_bytes) + READ_BYTES,
        )

    def open(self, target: Target, deadline: Deadline) -> Connection:
        """Return a new connection to the target's host; raises FetchError."""
        addresses = self._addresses(target, deadline)
        with failures_of_the_way(deadline):
            sock = self._connect(addresses, target.port, deadline)
        if target.scheme == "http":
            return Connection(sock, target, self._limits)
        try:
            with failures_of_the_way(deadline):
                sock.settimeout(deadline.cut(self._limits.timeout_seconds))
                tls_sock = self._tls_context.wrap_socket(sock, server_hostname=target.host)
        except FetchError:
            sock.close()
            raise
        return Connection(tls_sock, target, self._limits)

    def _addresses(self, target: Target, deadline: Deadline) -> Sequence[Address]:
        if target.address is not None:
            return [target.address]  # vet_url judged it
        answer = _resolve_in_time(self._resolve, target, deadline)
        return self._guard.vet_addresses(target.host, answer)

    def _connect(
        self, addresses: Sequence[Address], port: int, deadline: Deadline
    ) -> socket.socket:
        failure: OSError | None = None
        for address in addresses:
            timeout_seconds = deadline.cut(self._limits.timeout_seconds)
            try:
                sock = socket.create_connection((str(address), port), timeout_seconds)
            except OSError as error:
                failure = error
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
        if isinstance(failure, TimeoutError):
            raise failure
        raise FetchError(
            FailureReason.CONNECT_FAILURE, f"{addresses[-1]} port {port}: {failure}"
        ) from failure


def _resolve_in_time(resolve: Resolver, target: Target, deadline: Deadline) -> Sequence[str]:
    """Resolve on a thread of its own: the system's resolver knows no timeout, a URL does."""
    answer: Future[Sequence[str]] = Future()

    def ask() -> None:
        try:
            answer.set_result(resolve(target.host, target.port))
        except Exception as error:  # raised again by result(), on the thread that asked
            answer.set_exception(error)

    threading.Thread(target=ask, name=f"resolve {target.host}", daemon=True).start()
    try:
        return answer.result(timeout=deadline.cut(deadline.remaining_seconds))
    except TimeoutError as error:
        raise deadline.exceeded() from error
    except socket.gaierror as error:
        is_unknown = error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        reason = FailureReason.UNKNOWN_HOST if is_unknown else FailureReason.DNS_FAILURE
        raise FetchError(reason, f"{target.host}: {error.strerror}") from error
    except (OSError, UnicodeError) as error:
        raise FetchError(FailureReason.DNS_FAILURE, f"{target.host}: {error}") from error
