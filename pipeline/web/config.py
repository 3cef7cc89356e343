"""The limits that a fetch keeps: who may be called, how much may be read, how long it may take."""

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HeaderText = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]+$")]
Directive = Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True, min_length=1)]
Sha256 = Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9a-fA-F]{64}$")]
Port = Annotated[int, Field(ge=1, le=65535)]

_PACE = (
    "timeout_seconds",
    "total_seconds",
    "user_agent",
    "robots_cache_hosts",
    "max_connections_per_host",
    "max_host_wait_seconds",
    "max_idle_connections",
    "ca_file",
    "retry",
)


class RetryPolicy(BaseModel):
    """How often a transient failure is tried again, and how long to wait before each try."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Attempts for one URL, the first included."""
    base_delay_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """The longest pause after the first attempt."""
    backoff_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """How much longer each further pause is."""
    max_delay_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    """The longest pause."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of a delay that is drawn at random (seeded by the URL), so hosts see no bursts."""
    max_retry_after_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """A server that asks for a longer pause is obeyed by not asking again in this run."""


class Blocklist(BaseModel):
    """What is never fetched or kept, whoever lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    domains: tuple[str, ...] = ()
    """Host names; each covers its subdomains."""
    urls: tuple[str, ...] = ()
    """Exact URLs, whatever their spelling; credentials and fragments do not count."""
    image_sha256: tuple[Sha256, ...] = ()
    """Of the downloaded bytes; whoever holds the bytes checks this list, the fetcher does not."""


class FetchConfig(BaseModel):
    """Caps, deadlines and manners of every request; the defaults suit lists from the open web."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    allowed_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks that may be called although they are not public; public addresses always may."""
    allowed_ports: tuple[Port, ...] | Literal["any"] = (80, 443, 8080, 8443)
    """Ports that may be called, after every redirect too; `any` for all of them."""
    max_redirects: Annotated[int, Field(ge=0, le=20)] = 5
    """Redirects followed for one URL."""
    max_url_chars: Annotated[int, Field(ge=16)] = 8192
    """The longest URL that is looked at."""
    max_header_bytes: Annotated[int, Field(ge=256)] = 65536
    """The longest head of a response, status line and interim responses included."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 20 * 2**20
    """The longest body, decoded; with the number of threads it bounds a worker's memory."""
    timeout_seconds: Seconds = 10.0
    """For one connect, one handshake, one wait for the next bytes."""
    total_seconds: Seconds = 60.0
    """For one URL with its redirects, attempts and pauses; queueing for a busy host is extra."""
    user_agent: HeaderText = "capfilt/0.1"
    """Say who you are and how to reach you, as in `name/1.0 (+https://example.org/bot)`."""
    user_agent_token: HeaderText = "capfilt"
    """The name that robots.txt and X-Robots-Tag may address us by."""
    is_robots_txt_honoured: bool = False
    """Whether each host's robots.txt is fetched first and obeyed."""
    robots_cache_hosts: Annotated[int, Field(ge=1)] = 4096
    """Hosts whose robots.txt is remembered at a time."""
    disallowed_header_directives: tuple[Directive, ...] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
    )
    """X-Robots-Tag directives that forbid the image; empty ignores the header."""
    max_connections_per_host: Annotated[int, Field(ge=1)] = 8
    """URLs of one host that a worker process fetches at once."""
    max_host_wait_seconds: Seconds = 300.0
    """How long a URL queues for a host that already serves `max_connections_per_host`."""
    max_idle_connections: Annotated[int, Field(ge=0)] = 32
    """Connections kept open for the next URL of their host, over all hosts."""
    ca_file: str | None = None
    """PEM file of certificate authorities trusted in addition to the system's."""
    blocklist: Blocklist = Blocklist()
    """Domains, URLs and images that are never fetched or kept."""
    retry: RetryPolicy = RetryPolicy()
    """How often transient failures are tried again, and after which pauses."""

    def content(self) -> dict[str, Any]:
        """Return the settings that decide what may be fetched, for a corpus's fingerprint.

        The others decide pace and patience, and may differ from machine to machine.
        """
        return self.model_dump(mode="json", exclude=set(_PACE))

    @model_validator(mode="after")
    def _timeout_fits_total(self) -> Self:
        if self.timeout_seconds > self.total_seconds:
            raise ValueError(
                f"timeout_seconds ({self.timeout_seconds}) is longer than "
                f"total_seconds ({self.total_seconds})"
            )
        return self
