"""What a fetch gives back, how often it tries, how long it waits, and how politely."""

import datetime
import gzip
import ipaddress
import socket
import ssl
import threading
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_server import ScriptedServer, http

from pipeline.fetch import Fetcher, Surroundings, pause_seconds
from pipeline.opener import build_opener
from pipeline.web.config import FetchConfig, RetryPolicy
from pipeline.web.failures import FailureReason
from pipeline.web.transport import build_tls_context

NOW = 1_700_000_000.0
LOOPBACK = {"allowed_networks": ("127.0.0.1/32",), "allowed_ports": "any"}


class Waits:
    """Stands in for waiting: notes how long it should have been, and returns at once."""

    def __init__(self):
        self.seconds = []

    def __call__(self, event, seconds):
        self.seconds.append(seconds)
        return event.is_set()


def fetcher(*, surroundings=None, **config):
    config = {**LOOPBACK, "timeout_seconds": 2, "total_seconds": 10, **config}
    return Fetcher(FetchConfig(**config), surroundings=surroundings or Surroundings(wait=Waits()))


def replies(*answers):
    """A script that gives the answers in turn, the last one for ever."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def nothing(request):
    return iter(())


def test_a_fetch_returns_the_bytes_and_where_they_came_from():
    script = replies(http("302 Found", b"", Location="/b?x=1"), http(Content_Type="image/png"))
    with ScriptedServer(script) as server, fetcher() as web:
        result = web.fetch(server.url("/a"))
    assert (result.body, result.reason, result.http_status) == (b"image", None, 200)
    assert result.final_url == server.url("/b?x=1")
    assert (result.content_type, result.attempts) == ("image/png", 1)
    assert 0 < result.elapsed_seconds < 5
    assert "image" not in repr(result).replace("image/png", "")


def test_a_request_is_honest_and_asks_for_plain_bytes():
    with ScriptedServer(replies(http())) as server, fetcher(user_agent="bot/1 (+mail)") as web:
        web.fetch(server.url("/?q=1"))
    assert server.requests[0].path == "/?q=1"
    assert server.requests[0].headers["user-agent"] == "bot/1 (+mail)"
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert server.requests[0].headers["host"] == f"127.0.0.1:{server.port}"


def test_credentials_are_never_sent_not_even_on_a_redirect():
    def script(request):
        to = f"http://a:b@127.0.0.1:{server.port}/b"
        return http() if request.path == "/b" else http("301 Moved", b"", Location=to)

    with ScriptedServer(script) as server, fetcher() as web:
        result = web.fetch(server.url("/a").replace("//", "//user:secret@"))
    assert result.final_url == server.url("/b")
    assert len(server.requests) == 2
    for request in server.requests:
        assert "authorization" not in request.headers
        assert not any("secret" in value for value in (request.path, *request.headers.values()))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_followed(code):
    script = replies(http(f"{code} Moved", b"elsewhere", Location="b"), http())
    with ScriptedServer(script) as server, fetcher() as web:
        assert web.fetch(server.url("/a/a")).final_url == server.url("/a/b")
    assert server.num_connections == 1  # the short body was read, the connection kept


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("none", bytes),
    ],
)
def test_a_body_that_is_compressed_unasked_is_decoded(encoding, encode):
    body = bytes(range(256)) * 4000
    with (
        ScriptedServer(replies(http(body=encode(body), Content_Encoding=encoding))) as server,
        fetcher() as web,
    ):
        assert web.fetch(server.url()).body == body


def test_a_chunked_body_is_put_together():
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    )
    with ScriptedServer(replies(chunked)) as server, fetcher() as web:
        assert [web.fetch(server.url()).body for _ in range(2)] == [b"abcde"] * 2
    assert server.num_connections == 1


# Retries


@pytest.mark.parametrize("status", ["500 Oops", "502 Bad", "503 Busy", "599 x", "429 Slow down"])
def test_a_passing_failure_is_tried_again_with_growing_pauses(status):
    waits = Waits()
    policy = RetryPolicy(max_attempts=4, base_delay_seconds=1, backoff_factor=3, jitter=0)
    script = replies(http(status), http(status), http(status), http())
    with (
        ScriptedServer(script) as server,
        fetcher(retry=policy, total_seconds=60, surroundings=Surroundings(wait=waits)) as web,
    ):
        result = web.fetch(server.url())
    assert (result.body, result.attempts) == (b"image", 4)
    assert waits.seconds == [1, 3, 9]


def test_attempts_are_limited_and_the_last_failure_is_reported():
    with ScriptedServer(replies(http("503 Busy"))) as server, fetcher() as web:
        result = web.fetch(server.url())
    assert (result.reason, result.http_status) == (FailureReason.SERVER_ERROR, 503)
    assert result.attempts == len(server.requests) == 3
    assert result.is_transient


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, FailureReason.NOT_FOUND), (403, FailureReason.FORBIDDEN),
        (401, FailureReason.FORBIDDEN), (451, FailureReason.FORBIDDEN), (410, FailureReason.GONE),
        (400, FailureReason.HTTP_ERROR), (418, FailureReason.HTTP_ERROR),
        (304, FailureReason.HTTP_ERROR),
    ],
)  # fmt: skip
def test_a_final_answer_is_never_asked_for_again(status, reason):
    body = b"" if status == 304 else b"sorry"
    with ScriptedServer(replies(http(f"{status} No", body))) as server, fetcher() as web:
        result = web.fetch(server.url())
    assert (result.reason, result.http_status, result.attempts) == (reason, status, 1)
    assert len(server.requests) == 1
    assert not result.is_transient


def test_a_reset_and_a_silence_are_tried_again():
    def script(request):
        if len(server.requests) == 1:
            return nothing(request)
        if len(server.requests) == 2:
            return (b"" for _ in iter(lambda: server.stopping.wait(0.1), True))
        return http()

    with ScriptedServer(script) as server, fetcher(timeout_seconds=0.5) as web:
        result = web.fetch(server.url())
    assert (result.body, result.attempts) == (b"image", 3)


def test_names_that_do_not_resolve_are_tried_again():
    answers = [
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        socket.gaierror(socket.EAI_NONAME, "unknown"),
        ["127.0.0.1"],
    ]

    def resolve(host, port):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with (
        ScriptedServer(replies(http())) as server,
        fetcher(surroundings=Surroundings(resolve=resolve, wait=Waits())) as web,
    ):
        result = web.fetch(f"http://name.example:{server.port}/")
    assert (result.body, result.attempts) == (b"image", 3)
    assert server.requests[0].headers["host"] == f"name.example:{server.port}"


@pytest.mark.parametrize(
    ("code", "reason"),
    [(socket.EAI_NONAME, FailureReason.UNKNOWN_HOST), (socket.EAI_FAIL, FailureReason.DNS_FAILURE)],
)
def test_a_name_that_never_resolves_is_named_by_its_cause(code, reason):
    def resolve(host, port):
        raise socket.gaierror(code, "no")

    with fetcher(surroundings=Surroundings(resolve=resolve, wait=Waits())) as web:
        result = web.fetch("http://name.example/")
    assert (result.reason, result.attempts, result.is_transient) == (reason, 3, True)


def test_a_resolver_that_hangs_does_not_hold_the_worker():
    hanging = threading.Event()

    def resolve(host, port):
        hanging.wait()
        return []

    with fetcher(
        total_seconds=0.3, timeout_seconds=0.3, surroundings=Surroundings(resolve=resolve)
    ) as web:
        result = web.fetch("http://name.example/")
    hanging.set()
    assert result.reason is FailureReason.TOO_SLOW
    assert result.elapsed_seconds < 2


def in_an_hour():
    at = datetime.datetime.fromtimestamp(NOW, datetime.UTC) + datetime.timedelta(hours=1)
    return at.strftime("%a, %d %b %Y %H:%M:%S GMT")


@pytest.mark.parametrize(
    ("retry_after", "pauses"),
    [("7", [7.0]), ("0", [0.5]), ("soon", [0.5]), ("9" * 5000, []), ("3600", []),
     (in_an_hour(), []), ("Sun, 06 Nov 1994 08:49:37 GMT", [0.5])],
)  # fmt: skip
def test_retry_after_is_obeyed_by_waiting_or_by_leaving(retry_after, pauses):
    waits = Waits()
    script = replies(http("503 Busy", Retry_After=retry_after), http())
    with (
        ScriptedServer(script) as server,
        fetcher(
            retry=RetryPolicy(jitter=0, max_retry_after_seconds=30),
            surroundings=Surroundings(wait=waits, wall_clock=lambda: NOW),
        ) as web,
    ):
        result = web.fetch(server.url())
    assert waits.seconds == pauses
    assert result.attempts == 1 + len(pauses)
    assert result.is_transient is (not pauses)


def test_a_pause_that_outlasts_the_deadline_is_not_begun():
    waits = Waits()
    policy = RetryPolicy(base_delay_seconds=20, max_delay_seconds=20, jitter=0)
    with (
        ScriptedServer(replies(http("503 Busy"))) as server,
        fetcher(retry=policy, surroundings=Surroundings(wait=waits)) as web,
    ):
        assert web.fetch(server.url()).attempts == 1
    assert waits.seconds == []


def test_pauses_differ_between_urls_and_never_between_runs():
    policy = RetryPolicy(base_delay_seconds=1, jitter=0.5)
    pauses = [pause_seconds(policy, f"http://x.org/{n}", 1, None) for n in range(100)]
    assert pauses == [pause_seconds(policy, f"http://x.org/{n}", 1, None) for n in range(100)]
    assert len(set(pauses)) == 100
    assert all(0.5 <= pause <= 1 for pause in pauses)
    assert pause_seconds(policy, "u", 50, None) <= policy.max_delay_seconds


def test_closing_ends_a_pause_and_refuses_new_urls():
    policy = RetryPolicy(base_delay_seconds=8, jitter=0)
    paused = threading.Event()

    def wait(event, seconds):
        paused.set()
        return event.wait(seconds)

    with ScriptedServer(replies(http("503 Busy"))) as server, ThreadPoolExecutor(1) as pool:
        web = fetcher(retry=policy, surroundings=Surroundings(wait=wait))
        pending = pool.submit(web.fetch, server.url())
        assert paused.wait(5)
        web.close()
        result = pending.result(timeout=5)
    assert result.reason is FailureReason.CANCELLED
    assert result.elapsed_seconds < 5
    assert web.fetch(server.url()).reason is FailureReason.CANCELLED
    assert len(server.requests) == 1


# Connections


def test_a_connection_is_kept_for_the_next_url_of_its_host():
    with ScriptedServer(replies(http())) as server, fetcher() as web:
        assert all(web.fetch(server.url(f"/{n}")).body for n in range(5))
    assert server.num_connections == 1


def test_a_connection_that_the_server_closed_meanwhile_is_no_failed_attempt():
    def script(request):  # says keep-alive, but closes
        return iter((http(),))

    with ScriptedServer(script) as server, fetcher(retry=RetryPolicy(max_attempts=1)) as web:
        results = [web.fetch(server.url()) for _ in range(5)]
    assert [result.attempts for result in results] == [1] * 5
    assert all(result.body for result in results)


def test_what_a_server_sends_unasked_is_not_taken_for_the_next_answer():
    script = replies(http() + http(body=b"not asked for"), http(body=b"asked for"))
    with ScriptedServer(script) as server, fetcher() as web:
        assert web.fetch(server.url("/1")).body == b"image"
        assert web.fetch(server.url("/2")).body == b"asked for"


def test_what_an_earlier_answer_left_in_a_connection_fails_no_other_url():
    script = replies(http(), b"the rest of a body with a wrong length\r\n\r\n", http())
    with ScriptedServer(script) as server, fetcher() as web:
        results = [web.fetch(server.url(f"/{n}")) for n in range(2)]
    assert [(result.body, result.attempts) for result in results] == [(b"image", 1)] * 2
    assert server.num_connections == 2


def test_a_host_is_asked_by_few_threads_at_once():
    lock, gauge = threading.Lock(), {"now": 0, "most": 0}

    def script(request):
        with lock:
            gauge["now"] += 1
            gauge["most"] = max(gauge["most"], gauge["now"])
        server.stopping.wait(0.02)
        with lock:
            gauge["now"] -= 1
        return http()

    with (
        ScriptedServer(script) as server,
        fetcher(max_connections_per_host=3) as web,
        ThreadPoolExecutor(16) as pool,
    ):
        results = list(pool.map(web.fetch, [server.url(f"/{n}") for n in range(60)]))
    assert all(result.body for result in results)
    assert gauge["most"] == 3
    assert server.num_connections <= 16


def test_redirects_between_two_busy_hosts_cannot_lock_each_other_out():
    def script_to(other):
        return lambda request: (
            http() if request.path == "/end" else http("302 x", b"", Location=other().url("/end"))
        )

    with (
        ScriptedServer(script_to(lambda: b)) as a,
        ScriptedServer(script_to(lambda: a)) as b,
        fetcher(
            max_connections_per_host=1,
            allowed_networks=("127.0.0.0/8",),
            surroundings=Surroundings(resolve=lambda host, port: ["127.0.0.1"]),
        ) as web,
        ThreadPoolExecutor(8) as pool,
    ):
        urls = [server.url().replace("127.0.0.1", f"{name}.example")
                for _ in range(20) for name, server in (("a", a), ("b", b))]  # fmt: skip
        assert all(result.body for result in pool.map(web.fetch, urls, timeout=20))


def test_queueing_for_a_host_ends_and_does_not_count_against_the_url():
    release = threading.Event()

    def script(request):
        if request.path == "/slow":
            release.wait(10)
        return http()

    with (
        ScriptedServer(script) as server,
        fetcher(max_connections_per_host=1, max_host_wait_seconds=0.3, timeout_seconds=5) as web,
        ThreadPoolExecutor(1) as pool,
    ):
        slow = pool.submit(web.fetch, server.url("/slow"))
        while not server.requests:
            assert not server.stopping.wait(0.01)
        result = web.fetch(server.url("/queued"))
        release.set()
        assert slow.result(timeout=10).body
        assert web.fetch(server.url("/later")).body
    assert (result.reason, result.attempts) == (FailureReason.HOST_BUSY, 1)
    assert 0.3 <= result.elapsed_seconds < 3


def test_proxies_of_the_environment_are_ignored(monkeypatch):
    with ScriptedServer(replies(http())) as proxy, ScriptedServer(replies(http())) as server:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url())
        with fetcher() as web:
            assert web.fetch(server.url()).body
            assert build_opener(web).open(server.url()).read()
    assert proxy.num_connections == 0


def test_ipv6_works_where_it_is_allowed():
    try:
        server = ScriptedServer(replies(http()), address="::1").__enter__()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server, fetcher(allowed_networks=("::1/128",)) as web:
        result = web.fetch(server.url())
    assert result.body == b"image"
    assert server.requests[0].headers["host"] == f"[::1]:{server.port}"


def test_the_next_address_of_a_name_is_tried_when_one_does_not_answer():
    around = Surroundings(resolve=lambda host, port: ["127.0.0.3", "127.0.0.1"])
    with (
        ScriptedServer(replies(http())) as server,
        fetcher(allowed_networks=("127.0.0.0/8",), surroundings=around) as web,
    ):
        result = web.fetch(f"http://two.example:{server.port}/")
    assert (result.body, result.attempts) == (b"image", 1)


# Robots


def robots_script(robots_reply):
    return lambda request: robots_reply if request.path == "/robots.txt" else http()


@pytest.mark.parametrize(
    ("robots_reply", "path", "reason"),
    [
        (http(body=b"User-agent: *\nDisallow: /no"), "/no/a.jpg", FailureReason.ROBOTS_TXT),
        (http(body=b"User-agent: *\nDisallow: /no"), "/yes.jpg", None),
        (http(body=b"User-agent: *\nDisallow: /"), "/a", FailureReason.ROBOTS_TXT),
        (http(body=b"User-agent: *\nDisallow: /\nUser-agent: capfilt\nAllow: /"), "/a", None),
        (http("404 Not Found"), "/a", None),
        (http(body=b""), "/a", None),
        (http("503 Busy"), "/a", FailureReason.ROBOTS_UNREACHABLE),
        (http("302 x", b"", Location="http://169.254.169.254/"), "/a", FailureReason.ROBOTS_TXT),
        (http(body=b"\xff" * 3_000_000), "/a", FailureReason.ROBOTS_TXT),
    ],
)
def test_robots_txt_is_honoured_when_asked_for(robots_reply, path, reason):
    with (
        ScriptedServer(robots_script(robots_reply)) as server,
        fetcher(is_robots_txt_honoured=True) as web,
    ):
        assert web.fetch(server.url(path)).reason is reason
        assert (path in [request.path for request in server.requests]) is (reason is None)
    with ScriptedServer(robots_script(robots_reply)) as server, fetcher() as web:
        assert web.fetch(server.url(path)).body


def test_robots_txt_is_read_once_for_all_threads_and_forgotten_in_bounds():
    script = robots_script(http(body=b"User-agent: *\nAllow: /"))
    with (
        ScriptedServer(script) as server,
        fetcher(
            is_robots_txt_honoured=True,
            robots_cache_hosts=1,
            surroundings=Surroundings(resolve=lambda host, port: ["127.0.0.1"]),
        ) as web,
        ThreadPoolExecutor(8) as pool,
    ):

        def num_read():
            return sum(request.path == "/robots.txt" for request in server.requests)

        urls = [server.url(f"/{n}") for n in range(40)]
        assert all(result.body for result in pool.map(web.fetch, urls))
        assert num_read() == 1
        assert web.fetch(f"http://other.example:{server.port}/").body
        assert web.fetch(server.url("/again")).body
        assert num_read() == 3


def test_a_redirect_is_judged_by_the_robots_txt_of_where_it_leads():
    forbidding = robots_script(http(body=b"User-agent: *\nDisallow: /"))
    with (
        ScriptedServer(forbidding) as there,
        ScriptedServer(
            lambda request: http("404 x") if request.path == "/robots.txt"
            else http("302 x", b"", Location=there.url("/a.jpg"))
        ) as here,
        fetcher(is_robots_txt_honoured=True) as web,
    ):  # fmt: skip
        assert web.fetch(here.url()).reason is FailureReason.ROBOTS_TXT
    assert [request.path for request in there.requests] == ["/robots.txt"]


def test_x_robots_tag_forbids_an_image_unless_it_is_ignored():
    script = replies(http(X_Robots_Tag="noindex, noai"))
    with ScriptedServer(script) as server, fetcher() as web:
        result = web.fetch(server.url())
    assert (result.reason, result.attempts) == (FailureReason.ROBOTS_HEADER, 1)
    assert result.http_status == 200
    with ScriptedServer(script) as server, fetcher(disallowed_header_directives=()) as web:
        assert web.fetch(server.url()).body


# TLS


def certificate(folder, *, name="good.example", days=1, is_own_ca=True):
    """A self-signed certificate for a name and 127.0.0.1; returns the path of its PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=is_own_ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}{days}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return str(path)


def tls_server(path, script):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return ScriptedServer(script, tls=context)


def test_https_works_with_a_trusted_certificate_and_one_context_for_all(tmp_path):
    path = certificate(tmp_path)
    built = []

    def build(config):
        built.append(build_tls_context(config))
        return built[-1]

    surroundings = Surroundings(build_tls_context=build, resolve=lambda host, port: ["127.0.0.1"])
    named = []
    server = tls_server(path, replies(http()))
    server.tls.sni_callback = lambda sock, name, context: named.append(name)
    with (
        server,
        fetcher(ca_file=path, max_idle_connections=0, surroundings=surroundings) as web,
        ThreadPoolExecutor(4) as pool,
    ):
        urls = [server.url(), f"https://good.example:{server.port}/"] * 10
        assert all(result.body for result in pool.map(web.fetch, urls))
    assert server.num_connections == 20
    assert named.count("good.example") == 10  # the name goes into TLS, the address into connect
    assert len(built) == 1
    assert built[0].session_stats()["connect_good"] == 20
    assert built[0].verify_mode is ssl.CERT_REQUIRED


def test_a_certificate_that_cannot_be_trusted_ends_the_url(tmp_path):
    good = certificate(tmp_path)
    expired = certificate(tmp_path, days=-1)
    elsewhere = Surroundings(resolve=lambda host, port: ["127.0.0.1"], wait=Waits())
    for path, trusted, host in (
        (good, None, "good.example"),
        (good, good, "other.example"),
        (expired, expired, "good.example"),
    ):
        with (
            tls_server(path, replies(http())) as server,
            fetcher(ca_file=trusted, surroundings=elsewhere) as web,
        ):
            result = web.fetch(f"https://{host}:{server.port}/")
        assert (result.reason, result.attempts) == (FailureReason.TLS_FAILURE, 1)
        assert server.requests == []


# urllib


def test_the_opener_reaches_the_web_through_the_fetcher_and_nothing_else(tmp_path):
    (tmp_path / "secret").write_text("x")
    script = replies(http(Content_Type="image/jpeg"), http("404 Not Found"))
    with ScriptedServer(script) as server, fetcher(user_agent="bot/1") as web:
        opener = build_opener(web)
        request = urllib.request.Request(server.url("/a"), headers={"User-Agent": "other"})
        with opener.open(request, timeout=3) as response:
            assert response.read() == b"image"
            assert (response.status, response.url) == (200, server.url("/a"))
            assert response.headers["Content-Type"] == "image/jpeg"
        assert server.requests[0].headers["user-agent"] == "bot/1"
        with pytest.raises(urllib.error.HTTPError, match="not_found"):
            opener.open(server.url("/b"))
        for url in (f"file://{tmp_path}/secret", "data:,x", "ftp://127.0.0.1/", "http://10.0.0.1/"):
            with pytest.raises(urllib.error.URLError):
                opener.open(url)


@pytest.mark.slow
def test_img2dataset_downloads_through_the_opener():
    from img2dataset.downloader import download_image

    with ScriptedServer(replies(http())) as server, fetcher() as web:
        urllib.request.install_opener(build_opener(web))
        try:
            _, stream, error = download_image((0, server.url()), 3, None, ["noai"])
            assert (stream.read(), error) == (b"image", None)
            _, stream, error = download_image((0, "http://169.254.169.254/"), 3, None, ["noai"])
            assert stream is None
            assert "address_refused" in error
        finally:
            urllib.request.install_opener(None)
