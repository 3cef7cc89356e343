"""What a URL of the synthetic web does when it is called, and how many of them do it."""

from enum import StrEnum

from jobs.demo.shares import Share, Shares


class Delivery(StrEnum):
    """Whether the picture behind a URL can be had."""

    YES = "yes"
    RETRY = "retry"  # the first answer is an error, the second the picture
    POLICY = "policy"  # it comes, but a polite or a picky client does not take it
    NO = "no"


class Behaviour(StrEnum):
    """How the server answers for a URL."""

    OK = "ok"
    MOVED_ABSOLUTE = "moved_absolute"  # 301 to a full URL
    MOVED_RELATIVE = "moved_relative"  # 302 to a path
    MOVED_TWICE = "moved_twice"  # 307, then 302
    NO_LENGTH = "no_length"  # the body ends with the connection
    CHUNKED = "chunked"
    GZIP = "gzip"  # Content-Encoding: gzip, asked for or not
    WRONG_TYPE = "wrong_type"  # the picture as text/plain
    ERROR_THEN_OK = "error_then_ok"  # 500 first
    THROTTLED = "throttled"  # 429 with Retry-After first
    NOAI = "noai"  # the picture with X-Robots-Tag: noai
    ROBOTS = "robots"  # robots.txt disallows the path
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    GONE = "gone"
    SILENT = "silent"  # takes the request and does not answer
    RESET = "reset"  # TCP reset instead of an answer
    LOOP = "loop"  # redirects in a circle
    TO_PRIVATE = "to_private"  # redirects to 10.0.0.1
    TO_METADATA = "to_metadata"  # redirects to 169.254.169.254
    TRUNCATED = "truncated"  # closes before Content-Length is reached

    @property
    def delivery(self) -> Delivery:
        """Whether a careful client gets the picture."""
        return _DELIVERY.get(self, Delivery.NO)


_DELIVERY = {
    Behaviour.OK: Delivery.YES,
    Behaviour.MOVED_ABSOLUTE: Delivery.YES,
    Behaviour.MOVED_RELATIVE: Delivery.YES,
    Behaviour.MOVED_TWICE: Delivery.YES,
    Behaviour.NO_LENGTH: Delivery.YES,
    Behaviour.CHUNKED: Delivery.YES,
    Behaviour.GZIP: Delivery.YES,
    Behaviour.WRONG_TYPE: Delivery.YES,
    Behaviour.ERROR_THEN_OK: Delivery.RETRY,
    Behaviour.THROTTLED: Delivery.RETRY,
    Behaviour.NOAI: Delivery.POLICY,
    Behaviour.ROBOTS: Delivery.POLICY,
}


class BehaviourShares(Shares):
    """How many of the web's URLs do what; the others just serve their file."""

    moved_absolute: Share = 0.015
    moved_relative: Share = 0.015
    moved_twice: Share = 0.005
    no_length: Share = 0.01
    chunked: Share = 0.02
    gzip: Share = 0.005
    wrong_type: Share = 0.01
    error_then_ok: Share = 0.01
    throttled: Share = 0.005
    noai: Share = 0.008
    robots: Share = 0.004
    not_found: Share = 0.03
    forbidden: Share = 0.008
    gone: Share = 0.006
    silent: Share = 0.002
    reset: Share = 0.004
    loop: Share = 0.002
    to_private: Share = 0.001
    to_metadata: Share = 0.001
    truncated: Share = 0.005
