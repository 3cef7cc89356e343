"""The loopback server: every planned behaviour is what a client meets, in bounded time."""

import gzip
import http.client
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from jobs.demo.answers import ServerConfig
from jobs.demo.behaviours import Behaviour, Delivery
from jobs.demo.plan import SizeClass, WebConfig
from jobs.demo.server import WebServer
from jobs.demo.site import files_of, read_site
from jobs.demo.web import build_web

SMALL = WebConfig(seed=11, num_web=200, num_human=5, num_test=5, port=0)
CLIENT_TIMEOUT_SECONDS = 0.5
MAX_REDIRECTS = 5


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return build_web(tmp_path_factory.mktemp("web"), SMALL)


@pytest.fixture(scope="module")
def truth(web):
    return web.truth()


@pytest.fixture
def server(web):
    with WebServer(web.folder, config=ServerConfig(retry_after_seconds=0)) as running:
        yield running


def ask(server, path, method="GET"):
    """One request on a connection of its own: (status, headers, body)."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.port, timeout=CLIENT_TIMEOUT_SECONDS
    )
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def a_path(truth, behaviour):
    return next(path for path, planned in truth.items() if planned.behaviour is behaviour)


def bytes_behind(web, path):
    page = read_site(web.folder)[path]
    return files_of(web.folder).read_bytes()[page.offset : page.offset + page.num_bytes]


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [(Behaviour.NOT_FOUND, 404), (Behaviour.FORBIDDEN, 403), (Behaviour.GONE, 410)],
)
def test_refusals_have_their_status(server, truth, behaviour, status):
    path = a_path(truth, behaviour)
    assert [ask(server, path)[0] for _ in range(2)] == [status, status]


def test_a_plain_page_is_its_file_with_its_type_and_length(server, web, truth):
    for path, planned in truth.items():
        if planned.behaviour is Behaviour.OK:
            status, headers, body = ask(server, path)
            assert status == 200
            assert body == bytes_behind(web, path)
            assert headers["Content-Type"] == planned.file_kind.content_type
            assert int(headers["Content-Length"]) == len(body)


@pytest.mark.parametrize(
    ("behaviour", "stops"),
    [
        (Behaviour.MOVED_ABSOLUTE, [(301, "{base}/moved{path}")]),
        (Behaviour.MOVED_RELATIVE, [(302, "/moved{path}")]),
        (Behaviour.MOVED_TWICE, [(307, "/moving{path}"), (302, "/moved{path}")]),
    ],
)
def test_redirects_lead_to_the_file(server, web, truth, behaviour, stops):
    path = at = a_path(truth, behaviour)
    for status, location in stops:
        answered, headers, _ = ask(server, at)
        expected = location.format(base=server.base_url, path=path)
        assert (answered, headers["Location"]) == (status, expected)
        at = urlsplit(expected).path
    status, _, body = ask(server, at)
    assert (status, body) == (200, bytes_behind(web, path))


def test_a_loop_of_redirects_never_ends(server, truth):
    path = at = a_path(truth, Behaviour.LOOP)
    seen = []
    for _ in range(6):
        status, headers, _ = ask(server, at)
        assert status == 302
        at = headers["Location"]
        seen.append(at)
    assert seen == [f"/loop{path}", path] * 3


def test_redirects_to_forbidden_networks_name_them_and_nothing_more(server, truth):
    private = ask(server, a_path(truth, Behaviour.TO_PRIVATE))
    assert urlsplit(private[1]["Location"]).hostname == "10.0.0.1"
    metadata = ask(server, a_path(truth, Behaviour.TO_METADATA))
    assert metadata[1]["Location"] == "http://169.254.169.254/latest/meta-data/"
    assert private[2] == metadata[2] == b""


def test_a_body_without_length_ends_with_the_connection(server, web, truth):
    path = a_path(truth, Behaviour.NO_LENGTH)
    _, headers, body = ask(server, path)
    assert headers["Content-Length"] is None
    assert headers["Transfer-Encoding"] is None
    assert body == bytes_behind(web, path)


def test_chunks_add_up_to_the_file(server, web, truth):
    path = a_path(truth, Behaviour.CHUNKED)
    _, headers, body = ask(server, path)
    assert headers["Transfer-Encoding"] == "chunked"
    assert headers["Content-Length"] is None
    assert body == bytes_behind(web, path)


def test_gzip_comes_unasked_and_unpacks_to_the_file(server, web, truth):
    path = a_path(truth, Behaviour.GZIP)
    _, headers, body = ask(server, path)
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == bytes_behind(web, path)


def test_a_wrong_type_is_only_a_label(server, web, truth):
    path = a_path(truth, Behaviour.WRONG_TYPE)
    _, headers, body = ask(server, path)
    assert headers["Content-Type"].startswith("text/plain")
    assert body == bytes_behind(web, path)


def test_noai_is_said_in_a_header(server, truth):
    status, headers, body = ask(server, a_path(truth, Behaviour.NOAI))
    assert (status, headers["X-Robots-Tag"]) == (200, "noai")
    assert body


def test_robots_txt_covers_the_disallowed_pages_and_no_others(server, truth):
    _, _, text = ask(server, "/robots.txt")
    assert text == b"User-agent: *\nDisallow: /disallowed/\n"
    for path, planned in truth.items():
        assert path.startswith("/disallowed/") == (planned.behaviour is Behaviour.ROBOTS)


def test_a_truncated_body_stops_before_its_length(server, truth):
    with pytest.raises(http.client.IncompleteRead):
        ask(server, a_path(truth, Behaviour.TRUNCATED))


def test_a_reset_is_a_reset(server, truth):
    with pytest.raises(ConnectionResetError):
        ask(server, a_path(truth, Behaviour.RESET))


def test_a_silent_page_outlasts_the_client_and_not_the_server(web, truth):
    path = a_path(truth, Behaviour.SILENT)
    with WebServer(web.folder) as server, pytest.raises(TimeoutError):
        ask(server, path)
    with (
        WebServer(web.folder, config=ServerConfig(silence_seconds=0.05)) as server,
        pytest.raises(ConnectionResetError),
    ):
        ask(server, path)


def test_stopping_does_not_wait_for_silent_pages(web, truth):
    request = f"GET {a_path(truth, Behaviour.SILENT)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with WebServer(web.folder) as server:
        hanging = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        for each in hanging:
            each.sendall(request)
        ask(server, "/robots.txt")  # answered after the others were read
        began = time.monotonic()
    assert time.monotonic() - began < 2
    for each in hanging:
        each.close()


@pytest.mark.parametrize(
    ("behaviour", "status"), [(Behaviour.ERROR_THEN_OK, 500), (Behaviour.THROTTLED, 429)]
)
def test_a_second_attempt_succeeds(web, truth, behaviour, status):
    path = a_path(truth, behaviour)

    def statuses(recovery):
        with WebServer(web.folder, config=ServerConfig(recovery=recovery)) as server:
            return [ask(server, path)[0] for _ in range(4)]

    assert statuses("once") == [status, 200, 200, 200]
    assert statuses("alternate") == [status, 200, status, 200]


def test_a_restart_between_two_attempts_does_no_harm(web, truth):
    path = a_path(truth, Behaviour.ERROR_THEN_OK)
    with WebServer(web.folder) as server:
        assert ask(server, path)[0] == 500
    with WebServer(web.folder) as server:
        assert [ask(server, path)[0] for _ in range(2)] == [500, 200]


def test_throttling_says_how_long_to_wait(web, truth):
    with WebServer(web.folder, config=ServerConfig(retry_after_seconds=3)) as server:
        _, headers, _ = ask(server, a_path(truth, Behaviour.THROTTLED))
    assert headers["Retry-After"] == "3"


def test_other_requests_are_answered_and_not_obeyed(server, truth):
    path = a_path(truth, Behaviour.OK)
    assert ask(server, "/no/such/page")[0] == 404
    assert ask(server, "/../../etc/passwd")[0] == 404
    assert ask(server, path, "POST")[0] == 405
    status, headers, body = ask(server, path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


def test_the_host_in_a_request_does_not_matter(server, web, truth):
    path = a_path(truth, Behaviour.OK)
    assert ask(server, f"http://photos.example{path}")[2] == bytes_behind(web, path)


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x00" * 100_000,
        b"GET",
        b"GET http://[not-an-address HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_ends_the_conversation_and_no_other(server, sent, caplog):
    with socket.create_connection(("127.0.0.1", server.port), timeout=2) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass  # the server closed on unread bytes
    assert ask(server, "/robots.txt")[0] == 200
    assert caplog.records == []  # no exception went as far as asyncio's logger


def test_one_connection_carries_many_requests(server, truth):
    paths = [path for path, planned in truth.items() if planned.behaviour is Behaviour.OK][:50]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.connect()
    ours = connection.sock.getsockname()
    for path in paths:
        connection.request("GET", path)
        assert connection.getresponse().read() is not None
        assert connection.sock.getsockname() == ours
    connection.close()
    assert server.num_requests() == len(paths)
    assert server.num_requests(paths[0]) == 1


def test_only_loopback_is_bound(server):
    assert server.base_url == f"http://127.0.0.1:{server.port}"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in others - {"127.0.0.1"}:
        with pytest.raises(OSError, match=r"."):
            socket.create_connection((address, server.port), timeout=0.5)


def test_a_stopped_server_can_be_started_again_on_its_port(web):
    server = WebServer(web.folder).start()
    port = server.port
    ask(server, "/robots.txt")
    server.stop()
    server.stop()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.port
    with WebServer(web.folder, port=port) as again:
        assert again.port == port
        assert ask(again, "/robots.txt")[0] == 200


def test_a_folder_without_a_web_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"site\.json is missing"):
        WebServer(tmp_path)


def fetch(server, path):
    """Get a page as a careful client would, with one retry: what came, as a Delivery."""
    for attempt in range(2):
        at = path
        for _ in range(MAX_REDIRECTS):
            try:
                status, headers, body = ask(server, at)
            except (OSError, http.client.IncompleteRead):
                return Delivery.NO
            if status not in (301, 302, 307):
                break
            target = urlsplit(headers["Location"])
            if target.hostname not in (None, "127.0.0.1"):
                return Delivery.NO
            at = target.path
        if status == 200 and (headers["X-Robots-Tag"] or path.startswith("/disallowed/")):
            return Delivery.POLICY
        if status == 200 and body:
            return Delivery.RETRY if attempt else Delivery.YES
        if status not in (500, 429):
            return Delivery.NO
    return Delivery.NO


def test_all_pages_together_deliver_what_the_plan_says(server, truth):
    paths = [
        path
        for path, planned in truth.items()
        if planned.file_kind.is_image and planned.size_class is SizeClass.USUAL
    ]
    with ThreadPoolExecutor(16) as pool:
        met = dict(zip(paths, pool.map(lambda path: fetch(server, path), paths), strict=True))
    assert met == {path: truth[path].delivery for path in paths}


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_the_server_runs_as_a_process_of_its_own(web, truth, ending):
    command = [sys.executable, "-m", "jobs.demo.server", "--root", str(web.folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        base_url = process.stdout.readline().strip()
        path = a_path(truth, Behaviour.OK)
        connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=5)
        connection.request("GET", path)
        assert connection.getresponse().read() == bytes_behind(web, path)
        connection.close()
        process.send_signal(ending)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
