"""Why a URL gave no bytes: one closed list of reasons, and the error that carries one."""

from enum import StrEnum


class FailureReason(StrEnum):
    """One cause per failed URL, as the ledger names it."""

    # Refused before anything was sent: the URL, or where it leads.
    BAD_URL = "bad_url"
    URL_TOO_LONG = "url_too_long"
    SCHEME_REFUSED = "scheme_refused"
    HOST_REFUSED = "host_refused"
    PORT_REFUSED = "port_refused"
    ADDRESS_REFUSED = "address_refused"
    BLOCKED_DOMAIN = "blocked_domain"
    BLOCKED_URL = "blocked_url"
    ROBOTS_TXT = "robots_txt"
    ROBOTS_HEADER = "robots_header"
    # The way there.
    ROBOTS_UNREACHABLE = "robots_unreachable"
    UNKNOWN_HOST = "unknown_host"
    DNS_FAILURE = "dns_failure"
    CONNECT_FAILURE = "connect_failure"
    CONNECTION_RESET = "connection_reset"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"
    HOST_BUSY = "host_busy"
    CANCELLED = "cancelled"
    TLS_FAILURE = "tls_failure"
    # The answer's form.
    TOO_MANY_REDIRECTS = "too_many_redirects"
    REDIRECT_LOOP = "redirect_loop"
    BAD_REDIRECT = "bad_redirect"
    BAD_RESPONSE = "bad_response"
    HEADERS_TOO_LARGE = "headers_too_large"
    BODY_TOO_LARGE = "body_too_large"
    BAD_ENCODING = "bad_encoding"
    TRUNCATED_BODY = "truncated_body"
    EMPTY_BODY = "empty_body"
    # The answer's status.
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    GONE = "gone"
    TOO_MANY_REQUESTS = "too_many_requests"
    HTTP_ERROR = "http_error"
    SERVER_ERROR = "server_error"

    @property
    def is_transient(self) -> bool:
        """Whether the same URL may succeed later: on the next attempt or on another day."""
        return self in _TRANSIENT


_TRANSIENT = frozenset(
    {
        FailureReason.ROBOTS_UNREACHABLE,
        FailureReason.UNKNOWN_HOST,
        FailureReason.DNS_FAILURE,
        FailureReason.CONNECT_FAILURE,
        FailureReason.CONNECTION_RESET,
        FailureReason.TIMEOUT,
        FailureReason.TOO_SLOW,
        FailureReason.HOST_BUSY,
        FailureReason.CANCELLED,
        FailureReason.TRUNCATED_BODY,
        FailureReason.TOO_MANY_REQUESTS,
        FailureReason.SERVER_ERROR,
    }
)

_MAX_DETAIL_CHARS = 300
_STATUS_REASONS = {
    401: FailureReason.FORBIDDEN,
    403: FailureReason.FORBIDDEN,
    404: FailureReason.NOT_FOUND,
    410: FailureReason.GONE,
    429: FailureReason.TOO_MANY_REQUESTS,
    451: FailureReason.FORBIDDEN,
}


def reason_for_status(status: int) -> FailureReason:
    """Return the reason that an HTTP status outside 2xx and the redirects stands for."""
    if status >= 500:
        return FailureReason.SERVER_ERROR
    return _STATUS_REASONS.get(status, FailureReason.HTTP_ERROR)


def printable(text: str) -> str:
    """Return what a stranger wrote, fit for a log and a table: cut short, no control characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_DETAIL_CHARS])


class FetchError(Exception):
    """A URL failed, for one reason; `detail` says what was seen, in printable words."""

    def __init__(
        self,
        reason: FailureReason,
        detail: str,
        *,
        http_status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        """`retry_after_seconds` is what the server asked for, None when it did not ask."""
        self.reason = reason
        self.detail = printable(detail)
        super().__init__(f"{reason}: {self.detail}")
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds
