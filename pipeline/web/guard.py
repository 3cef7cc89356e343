"""Who may be called: every URL and every address is judged here before a byte is sent."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pipeline.web.config import FetchConfig
from pipeline.web.failures import FailureReason, FetchError

Address = IPv4Address | IPv6Address
DEFAULT_PORTS = {"http": 80, "https": 443}

# IANA's special-purpose registry, and two that it does not hold: multicast and a public address
# that Azure answers as a machine's own metadata service. Written out, because what Python's
# `is_global` covers differs between versions.
_REFUSED_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Global unicast is 2000::/3 and nothing else, which already leaves out loopback, unique-local,
# link- and site-local, multicast, NAT64 and the IPv4-mapped and -compatible forms. From it go
# the protocol assignments (Teredo among them), documentation, 6to4 and AS112.
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_REFUSED_IPV6 = tuple(
    IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)

_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_ENDS_IN_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?$")
_IDNA_DOTS = re.compile("[.\u3002\uff0e\uff61]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE_IN_PATH = string.punctuation.replace("\\", "").replace('"', "").replace("^", "")


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was judged: where to connect, and what to ask for."""

    scheme: str
    host: str
    """ASCII, lower case, without brackets or a trailing dot."""
    port: int
    path: str
    """Path and query, percent-encoded ASCII."""

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: what a connection, or a robots.txt, belongs to."""
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        """The value of the Host header; the port is left out when it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL in its one normal form, without credentials and fragment."""
        return f"{self.scheme}://{self.host_header}{self.path}"

    @property
    def address(self) -> Address | None:
        """The address when the host is one, None when it is a name."""
        return _literal(self.host)


def parse_target(url: str, *, max_chars: int) -> Target:
    """Return the parts of an http or https URL, credentials and fragment dropped.

    An IPv4 host must be written as four decimal numbers: decimal, octal, hexadecimal and short
    forms, and digits or dots outside ASCII, mean an address to some readers and a name to others.
    Raises FetchError with the reason.
    """
    if len(url) > max_chars:
        raise FetchError(FailureReason.URL_TOO_LONG, f"{len(url)} characters, at most {max_chars}")
    url = url.strip(" \t\r\n")
    if found := _CONTROL.search(url):
        raise _bad_url(f"control character {found.group()!r} at {found.start()}")
    parts = _split(url)
    if parts.scheme not in DEFAULT_PORTS:
        raise FetchError(FailureReason.SCHEME_REFUSED, f"{parts.scheme or 'no scheme'!r}")
    host, port = _host_and_port(parts)
    return Target(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], _path(parts))


def redirect_url(base: Target, location: str) -> str:
    """Return the absolute URL that a Location header leads to, as the server wrote its bytes."""
    try:  # http.client hands headers over as Latin-1; quoting gives the server its bytes back
        quoted = quote(location.strip(), safe=string.punctuation, encoding="latin-1")
        return urljoin(base.url, quoted)
    except ValueError as error:
        raise FetchError(FailureReason.BAD_REDIRECT, f"{location[:200]!r}: {error}") from error


def is_public(address: Address) -> bool:
    """Tell whether an address is plain global unicast: no special purpose, nothing embedded."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_IPV4)
    return (
        address.scope_id is None
        and address in _GLOBAL_IPV6
        and not any(address in network for network in _REFUSED_IPV6)
    )


class Guard:
    """Says which URLs and addresses a configuration lets us call; holds no connection, no state."""

    def __init__(self, config: FetchConfig) -> None:
        """Raises ValueError when the blocklist holds something that is no domain or URL."""
        self._max_chars = config.max_url_chars
        self._networks = config.allowed_networks
        self._ports = None if config.allowed_ports == "any" else frozenset(config.allowed_ports)
        self._domains = frozenset(_blocked_domain(name) for name in config.blocklist.domains)
        self._urls = frozenset(
            _blocked_url(url, config.max_url_chars) for url in config.blocklist.urls
        )

    def vet_url(self, url: str) -> Target:
        """Return the parsed URL; raises FetchError when it must not be called."""
        target = parse_target(url, max_chars=self._max_chars)
        if self._ports is not None and target.port not in self._ports:
            raise FetchError(FailureReason.PORT_REFUSED, f"port {target.port}")
        if domain := self._blocking_domain(target.host):
            raise FetchError(FailureReason.BLOCKED_DOMAIN, domain)
        if target.url in self._urls:
            raise FetchError(FailureReason.BLOCKED_URL, target.url)
        if target.address is not None:
            self.vet_addresses(target.host, [target.host])
        return target

    def vet_addresses(self, host: str, addresses: Iterable[str]) -> Sequence[Address]:
        """Return what a name resolved to, if all of it may be called, in the resolver's order.

        One refused address refuses the name: a name that points inside and outside is an attack
        or an accident, and neither deserves a choice.
        """
        vetted: list[Address] = []
        for text in addresses:
            try:
                address = ip_address(text)
            except ValueError as error:
                raise FetchError(FailureReason.ADDRESS_REFUSED, f"{host}: {error}") from error
            if not (is_public(address) or any(address in allowed for allowed in self._networks)):
                raise FetchError(FailureReason.ADDRESS_REFUSED, f"{host} is at {address}")
            if address not in vetted:
                vetted.append(address)
        if not vetted:
            raise FetchError(FailureReason.UNKNOWN_HOST, f"{host} has no address")
        return vetted

    def _blocking_domain(self, host: str) -> str | None:
        labels = host.split(".")
        domains = (".".join(labels[start:]) for start in range(len(labels)))
        return next((domain for domain in domains if domain in self._domains), None)


def _bad_url(detail: str) -> FetchError:
    return FetchError(FailureReason.BAD_URL, detail)


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise _bad_url(str(error)[:200]) from error


def _host_and_port(parts: SplitResult) -> tuple[str, int | None]:
    if "\\" in parts.netloc:  # browsers read it as a slash, so the host would not be what it seems
        raise _bad_url("backslash in the host")
    try:
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise _bad_url(str(error)[:200]) from error
    if not name or port == 0:
        raise _bad_url("no host" if not name else "port 0")
    return (_ipv6(name) if ":" in name else _name_or_ipv4(name)), port


def _ipv6(name: str) -> str:
    if "%" in name:
        raise FetchError(FailureReason.HOST_REFUSED, f"zone in {name[:80]!r}")
    try:
        return str(IPv6Address(name))
    except ValueError as error:
        raise _bad_url(str(error)[:200]) from error


def _name_or_ipv4(name: str) -> str:
    host = name.lower() if name.isascii() else _to_ascii(name)
    if _ENDS_IN_NUMBER.search(host):
        if not name.isascii() or _literal(host) is None:
            raise FetchError(FailureReason.HOST_REFUSED, f"odd spelling of an address: {name!r}")
        return host
    host = host.removesuffix(".")
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise FetchError(FailureReason.HOST_REFUSED, f"no host name: {name[:80]!r}")
    return host


def _to_ascii(name: str) -> str:
    if _IDNA_DOTS.split(name)[-1].isdigit():  # some readers take any script's digits for a number
        raise FetchError(FailureReason.HOST_REFUSED, f"odd spelling of an address: {name[:80]!r}")
    try:
        return name.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise FetchError(FailureReason.HOST_REFUSED, f"no host name: {name[:80]!r}") from error


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)  # of IPv4 it takes four plain decimal numbers only
    except ValueError:
        return None


def _path(parts: SplitResult) -> str:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        return quote(path, safe=_SAFE_IN_PATH)
    except UnicodeEncodeError as error:
        raise _bad_url(f"not text: {error.reason}") from error


def _blocked_domain(name: str) -> str:
    try:
        return _name_or_ipv4(name.strip().removeprefix("*.").removeprefix("."))
    except FetchError as error:
        raise ValueError(f"blocklist.domains: {name!r} is no domain ({error.detail})") from error


def _blocked_url(url: str, max_chars: int) -> str:
    try:
        return parse_target(url, max_chars=max_chars).url
    except FetchError as error:
        raise ValueError(f"blocklist.urls: {url[:200]!r} cannot be fetched ({error})") from error
