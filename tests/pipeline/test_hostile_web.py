"""Everything a server can do to whoever calls it: each ends as one reason, bounded, on loopback.

Every connection this process makes is seen by an audit hook, so "no request leaves the guard" is
asserted on what the operating system was asked for, and not on what the fetcher says it did.
"""

import gzip
import sys
import threading
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import ScriptedServer, http

from pipeline.fetch import Fetcher, Surroundings
from pipeline.web.config import FetchConfig, RetryPolicy
from pipeline.web.failures import FailureReason as Reason

MIB = 2**20
LIMITS = {
    "allowed_networks": ("127.0.0.1/32",),
    "allowed_ports": "any",
    "max_body_bytes": MIB,
    "max_header_bytes": 16384,
    "timeout_seconds": 3,
    "total_seconds": 5,
    "retry": RetryPolicy(max_attempts=1),
}
MAX_SECONDS = 6.0
IMPATIENT = {"timeout_seconds": 0.5, "total_seconds": 1.5}
MAX_GROWTH_MIB = 24.0  # the body's cap, the wire's buffers, and the server, which lives here too

connected: list[object] = []


def _note_connection(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect":
        connected.append(arguments[1])


sys.addaudithook(_note_connection)


def peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def canary():
    """A listener on a loopback address that is not allowed; nobody may ever reach it."""
    with ScriptedServer(lambda request: http(body=b"secret"), address="127.0.0.2") as server:
        yield server
        assert server.num_connections == 0


@pytest.fixture
def attack(canary, capsys, request):
    """Serve a script, fetch from it under the limits, report and check the cost."""

    def run(script, path="/", *, surroundings=None, url=None, **config):
        connected.clear()
        with (
            ScriptedServer(script) as server,
            Fetcher(FetchConfig(**{**LIMITS, **config}), surroundings=surroundings) as web,
        ):
            forget_peak()
            before = peak_mib()
            result = web.fetch(url or server.url(path))
            growth_mib = peak_mib() - before
            allowed = ("127.0.0.1", server.port)
        with capsys.disabled():
            sys.stdout.write(
                f"\n{request.node.name[:70]:70} {result.reason or 'ok':20} "
                f"{result.elapsed_seconds:5.2f} s {growth_mib:5.1f} MiB "
            )
        assert set(connected) <= {allowed}
        assert result.elapsed_seconds < MAX_SECONDS
        assert growth_mib < MAX_GROWTH_MIB
        return result

    return run


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def for_ever(piece: bytes, first: bytes = b"") -> Iterator[bytes]:
    yield first
    while True:
        yield piece


def dripping(server_stops, piece: bytes, first: bytes = b"") -> Iterator[bytes]:
    yield first
    while not server_stops.wait(0.05):
        yield piece


# Where a redirect leads


def redirect_targets(port):
    inside = [
        "http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]:{port}/",
        "http://[::ffff:7f00:2]:{port}/", "http://[::1]:{port}/", "http://2130706434:{port}/",
        "http://0x7f000002:{port}/", "http://0177.0.0.2:{port}/", "http://127.2:{port}/",
        "http://127.0.0.2:{port}/", "//127.0.0.2:{port}/", "http://127.0.0.2.:{port}/",
        "http://127。0。0。2:{port}/", "http://127.0.0.1@127.0.0.2:{port}/",
        "http://user:pass@127.0.0.2:{port}/", "http://10.0.0.1/", "http://0.0.0.0:{port}/",
        "http://[64:ff9b::7f00:2]:{port}/", "http://[2002:7f00:2::]:{port}/",
        "http://[fe80::1%25lo]:{port}/", "http://100.100.100.200/", "http://224.0.0.1/",
        "file:///etc/passwd", "ftp://127.0.0.2:{port}/", "gopher://127.0.0.2:{port}/",
        "data:image/png;base64,AAAA", "http://127.0.0.1\\@127.0.0.2:{port}/", "http://[/", "http://:80/",
    ]  # fmt: skip
    return [target.format(port=port) for target in inside]


REFUSALS = {
    Reason.ADDRESS_REFUSED, Reason.HOST_REFUSED, Reason.SCHEME_REFUSED, Reason.BAD_URL,
    Reason.BAD_REDIRECT,
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(redirect_targets(0))))
def test_a_redirect_into_the_house_is_refused(number, attack, canary):
    target = redirect_targets(canary.port)[number].encode().decode("latin-1")
    result = attack(lambda request: http("302 Found", b"", Location=target))
    assert result.reason in REFUSALS
    assert (result.http_status, result.attempts, result.is_transient) == (302, 1, False)


@pytest.mark.parametrize("number", range(len(redirect_targets(0))))
def test_the_same_url_in_a_list_is_refused_before_anything_is_sent(number, attack, canary):
    target = redirect_targets(canary.port)[number]
    result = attack(lambda request: http(), url="http:" * target.startswith("//") + target)
    assert result.reason in REFUSALS
    assert result.attempts == 0
    assert connected == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda request: http("302 x", b"", Location=request.path), Reason.REDIRECT_LOOP),
        (
            lambda request: http("302 x", b"", Location="/b" if request.path == "/" else "/"),
            Reason.REDIRECT_LOOP,
        ),
        (
            lambda request: http("302 x", b"", Location=request.path + "a"),
            Reason.TOO_MANY_REDIRECTS,
        ),
        (lambda request: http("302 x", b""), Reason.BAD_REDIRECT),
        (lambda request: http("302 x", b"", Location=""), Reason.BAD_REDIRECT),
        (lambda request: http("302 x", b"", Location="/" + "a" * 9000), Reason.URL_TOO_LONG),
        (
            lambda request: http("302 x", b"", Location="/" + "a" * MIB),
            Reason.HEADERS_TOO_LARGE,
        ),
    ],
)
def test_redirects_that_lead_nowhere_end(make, reason, attack):
    assert attack(make).reason is reason


# Names


def test_a_name_that_points_outside_and_inside_is_refused(attack, canary):
    for addresses in (["8.8.8.8", "127.0.0.2"], ["127.0.0.1", "169.254.169.254"], ["::1"], ["x"]):
        around = Surroundings(resolve=lambda host, port, found=addresses: found)
        url = f"http://name.example:{canary.port}/"
        result = attack(lambda request: http(), url=url, surroundings=around)
        assert result.reason is Reason.ADDRESS_REFUSED
        assert connected == []


def test_a_name_that_changes_its_mind_is_connected_where_it_was_checked(canary):
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"]]
    asked = []

    def resolve(host, port):
        asked.append(host)
        return answers[len(asked) - 1]

    connected.clear()
    config = FetchConfig(**LIMITS, max_idle_connections=0)
    with (
        ScriptedServer(lambda request: http()) as server,
        Fetcher(config, surroundings=Surroundings(resolve=resolve)) as web,
    ):
        results = [web.fetch(f"http://rebind.example:{server.port}/{n}") for n in range(3)]
    assert [result.reason for result in results] == [None, Reason.ADDRESS_REFUSED, None]
    assert asked == ["rebind.example"] * 3  # once per connection, never again for the connect
    assert connected == [("127.0.0.1", server.port)] * 2


# What is sent back

BOMB = zlib.compressobj(9, wbits=31)
GZIP_BOMB = BOMB.compress(bytes(200 * MIB)) + BOMB.flush()
CHUNKED = head("Transfer-Encoding: chunked")

ANSWERS = {
    "endless body": (lambda: for_ever(b"x" * 65536, head()), Reason.BODY_TOO_LARGE),
    "endless chunks": (
        lambda: for_ever(b"10000\r\n" + b"x" * 65536 + b"\r\n", CHUNKED),
        Reason.BODY_TOO_LARGE,
    ),
    "endless tiny chunks": (
        lambda: for_ever(b"1\r\nx\r\n" * 9999, CHUNKED),
        Reason.BODY_TOO_LARGE,
    ),
    "chunk of size -1, endless": (
        lambda: for_ever(b"x" * 65536, CHUNKED + b"-1\r\n"),
        Reason.BODY_TOO_LARGE,
    ),
    "chunk of size -5": (lambda: CHUNKED + b"-5\r\nabcde\r\n", Reason.BAD_RESPONSE),
    "chunk of absurd size": (
        lambda: iter([CHUNKED + b"f" * 30 + b"\r\nabc"]),
        Reason.TRUNCATED_BODY,
    ),
    "chunk size that is no number": (lambda: CHUNKED + b"xyz\r\nabc", Reason.TRUNCATED_BODY),
    "endless chunk extension": (
        lambda: for_ever(b"x" * 65536, CHUNKED + b"5;"),
        Reason.HEADERS_TOO_LARGE,
    ),
    "endless trailers": (
        lambda: for_ever(b"a: b\r\n" * 9999, CHUNKED + b"1\r\nx\r\n0\r\n"),
        Reason.BODY_TOO_LARGE,
    ),
    "chunks that end early": (lambda: iter([CHUNKED + b"a\r\nabc"]), Reason.TRUNCATED_BODY),
    "length over the cap": (
        lambda: for_ever(b"x" * 65536, head(f"Content-Length: {10**13}")),
        Reason.BODY_TOO_LARGE,
    ),
    "length longer than the body": (
        lambda: iter([head("Content-Length: 9000") + b"x" * 100]),
        Reason.TRUNCATED_BODY,
    ),
    "length shorter than the body": (lambda: head("Content-Length: 5") + b"x" * 100, None),
    "length below zero, endless": (
        lambda: for_ever(b"x" * 65536, head("Content-Length: -7")),
        Reason.BODY_TOO_LARGE,
    ),
    "length that is no number": (
        lambda: for_ever(b"x" * 65536, head("Content-Length: many")),
        Reason.BODY_TOO_LARGE,
    ),
    "length of 5000 digits": (
        lambda: for_ever(b"x" * 65536, head("Content-Length: " + "9" * 5000)),
        Reason.BODY_TOO_LARGE,
    ),
    "zero bytes": (lambda: http(body=b""), Reason.EMPTY_BODY),
    "204": (lambda: head(status="204 No Content"), Reason.EMPTY_BODY),
    "gzip bomb": (
        lambda: http(body=GZIP_BOMB, Content_Encoding="gzip"),
        Reason.BODY_TOO_LARGE,
    ),
    "gzip bomb in chunks, endless": (
        lambda: for_ever(
            b"%x\r\n%b\r\n" % (len(GZIP_BOMB), GZIP_BOMB),
            head("Transfer-Encoding: chunked", "Content-Encoding: gzip"),
        ),
        Reason.BODY_TOO_LARGE,
    ),
    "gzip in gzip": (
        lambda: http(body=gzip.compress(GZIP_BOMB), Content_Encoding="gzip, gzip"),
        Reason.BAD_ENCODING,
    ),
    "gzip of nothing, endless": (
        lambda: for_ever(bytes(65536), head("Content-Encoding: gzip") + gzip.compress(b"")),
        Reason.BODY_TOO_LARGE,
    ),
    "gzip that is none": (
        lambda: http(body=b"\xff\xd8\xff\xe0", Content_Encoding="gzip"),
        Reason.BAD_ENCODING,
    ),
    "gzip that ends early": (
        lambda: http(body=gzip.compress(b"image" * 999)[:-20], Content_Encoding="gzip"),
        Reason.TRUNCATED_BODY,
    ),
    "brotli": (lambda: http(Content_Encoding="br"), Reason.BAD_ENCODING),
    "endless headers": (lambda: for_ever(b"a: b\r\n" * 999, head()[:-2]), Reason.HEADERS_TOO_LARGE),
    "endless header": (lambda: for_ever(b"x" * 65536, head()[:-2]), Reason.HEADERS_TOO_LARGE),
    "endless status line": (lambda: for_ever(b"x" * 65536, b"HTTP/1.1 "), Reason.HEADERS_TOO_LARGE),
    "100 Continue for ever": (
        lambda: for_ever(head(status="100 Continue") * 99),
        Reason.HEADERS_TOO_LARGE,
    ),
    "200 headers": (lambda: head(*["a: b"] * 200), Reason.HEADERS_TOO_LARGE),
    "no HTTP": (lambda: iter([b"SSH-2.0-OpenSSH_9.2\r\n" * 9]), Reason.BAD_RESPONSE),
    "only newlines": (lambda: for_ever(b"\r\n" * 9999), Reason.BAD_RESPONSE),
    "binary noise": (lambda: iter([bytes(range(256)) * 9]), Reason.BAD_RESPONSE),
    "headers that are no UTF-8": (lambda: http(X_Name="\xff\xfe\x85"), None),
    "status of three letters": (lambda: head(status="abc OK"), Reason.BAD_RESPONSE),
    "status -1": (lambda: head(status="-1 OK"), Reason.BAD_RESPONSE),
    "no answer": (lambda: iter(()), Reason.CONNECTION_RESET),
    "a head and no more": (lambda: iter([head()]), Reason.EMPTY_BODY),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_answer_ends_as_a_reason(name, attack):
    make, reason = ANSWERS[name]
    result = attack(lambda request: make())
    assert result.reason is reason, result.detail
    assert result.body is None or len(result.body) <= MIB


def test_a_bomb_that_fits_the_wire_is_stopped_at_the_cap_of_what_comes_out():
    assert len(GZIP_BOMB) < MIB < 200 * MIB == len(zlib.decompress(GZIP_BOMB, wbits=31))


@pytest.mark.parametrize("first", [b"", head(), head("Content-Length: 900000"), CHUNKED + b"5\r\n"])
def test_a_slow_drip_cannot_hold_a_worker(first, attack):
    stops = threading.Event()
    result = attack(lambda request: dripping(stops, b"x", first), **IMPATIENT)
    stops.set()
    assert result.reason is Reason.TOO_SLOW
    assert result.elapsed_seconds < 2.5
    assert result.is_transient


def test_dripping_redirects_share_one_deadline(attack):
    stops, numbers = threading.Event(), count()

    def script(request):
        stops.wait(0.3)
        return http("302 x", b"", Location=f"/{next(numbers)}")

    result = attack(script, max_redirects=20, **IMPATIENT)
    stops.set()
    assert result.reason is Reason.TOO_SLOW
    assert result.elapsed_seconds < 2.5


@pytest.mark.parametrize("first", [b"", head("Content-Length: 99")])
def test_a_server_that_falls_silent_is_left(first, attack):
    stops = threading.Event()

    def script(request):
        yield first
        stops.wait(10)

    result = attack(script, **IMPATIENT)
    stops.set()
    assert result.reason is Reason.TIMEOUT
    assert result.elapsed_seconds < 1.5


def test_tls_on_a_port_that_speaks_none_is_a_reason(attack, canary):
    with ScriptedServer(lambda request: http()) as plain:
        web = Fetcher(FetchConfig(**{**LIMITS, **IMPATIENT}))
        result = web.fetch(plain.url().replace("http:", "https:"))
        web.close()
    assert result.reason in (Reason.TLS_FAILURE, Reason.CONNECTION_RESET, Reason.TIMEOUT)


def test_nobody_listens_is_a_reason(attack):
    with ScriptedServer(lambda request: http()) as gone:
        pass
    with Fetcher(FetchConfig(**LIMITS)) as web:
        result = web.fetch(gone.url())
    assert (result.reason, result.is_transient) == (Reason.CONNECT_FAILURE, True)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/\r\nX-Injected: 1", "http://127.0.0.1:{port}/\0",
        "http://127.0.0.1\r\n:{port}/", "http://127.0.0.1:{port}/\ud800",
        "http://127.0.0.1:{port}/" + "a" * MIB, "http://" + "a" * MIB,
        "http://127.0.0.1:{port}/\x7f", "http://" + "ä" * 4000 + ".example/",
        "http://" + "@" * 8000, "http://127.0.0.1:{port}:{port}/", "\0", "http://%00/",
    ],
)  # fmt: skip
def test_a_hostile_url_sends_nothing(url, attack, canary):
    result = attack(lambda request: http(), url=url.replace("{port}", str(canary.port)))
    assert result.reason in REFUSALS | {Reason.URL_TOO_LONG}
    assert result.attempts == 0
    assert connected == []


def test_what_a_server_writes_into_a_log_is_printable_and_short(attack):
    loud = attack(lambda request: head(status="418 \x1b[2J\x07\x85" + "x" * 9999))
    assert loud.detail.isprintable()
    assert len(loud.detail) < 200
    typed = attack(lambda request: http(Content_Type="image/jpeg\x1b[31m\r\n " + "y" * 9999))
    assert typed.content_type.startswith("image/jpeg?[31m")
    assert typed.content_type.isprintable()
    assert len(typed.content_type) <= 300


pieces = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 302 Found\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 503 Busy\r\n", b"Content-Length: ", b"5\r\n", b"-1\r\n", b"\r\n",
            b"\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Location: /\r\n",
            b"Location: http://127.0.0.2/\r\n", b"X-Robots-Tag: ", b"Retry-After: ", b"a: b\r\n",
            b"0\r\n\r\n", b"5\r\nhello\r\n", gzip.compress(b"hello"), b"Connection: close\r\n",
        ]
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def scripted():
    """A server that answers with what its list holds, and a fetcher that tries twice at most."""
    answer: list[bytes] = []
    limits = {**LIMITS, "retry": RetryPolicy(max_attempts=2, base_delay_seconds=0)}
    with (
        ScriptedServer(lambda request: iter(answer)) as server,
        Fetcher(FetchConfig(**limits)) as web,
    ):
        yield answer, server, web


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(pieces, max_size=12))
def test_any_answer_gives_a_result_and_never_an_exception(scripted, sent):
    answer, server, web = scripted
    answer[:] = [b"HTTP/1.1 200 OK\r\n", *sent]
    connected.clear()
    result = web.fetch(server.url())
    assert (result.body is None) is (result.reason is not None)
    assert result.detail.isprintable()
    assert set(connected) <= {("127.0.0.1", server.port)}


def test_bytes_that_are_no_ascii_are_quoted_on_the_way():
    with (
        ScriptedServer(lambda request: http()) as server,
        Fetcher(FetchConfig(**LIMITS)) as web,
    ):
        assert web.fetch(server.url("/ü?ß= \u202e")).body
    assert server.requests[0].path == "/%C3%BC?%C3%9F=%20%E2%80%AE"
