"""A spot node's end is noticed and told to Ray; a cloud that stutters is asked again."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.spot_notice import Cloud, watch


class Metadata:
    """A cloud's metadata service on loopback: answers in turn, the last one for ever."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                self.reply(200, "a-token")

            def do_GET(self):
                service.asked.append(self.headers)
                answers = service.answers
                self.reply(*(answers.pop(0) if len(answers) > 1 else answers[0]))

            def reply(self, code, text):
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def metadata():
    services = []

    def start(*answers):
        services.append(Metadata(*answers))
        return services[-1]

    yield start
    for service in services:
        service.server.shutdown()
        service.server.server_close()


@pytest.fixture
def ray_calls(tmp_path, monkeypatch):
    """Stand in for the `ray` command and keep what it was called with."""
    calls = tmp_path / "calls"
    (tmp_path / "ray").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {calls}\n')
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return calls


def test_aws_is_asked_with_its_token_until_it_gives_notice(metadata, ray_calls):
    notice = (200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
    service = metadata((404, ""), (500, ""), (404, ""), notice)
    cloud = Cloud("aws", f"{service.url}/notice", token_url=f"{service.url}/token")
    watch(cloud, look_seconds=0.01)
    assert len(service.asked) == 4
    tokens = [headers["X-aws-ec2-metadata-token"] for headers in service.asked]
    assert tokens == ["a-token"] * 4
    said = ray_calls.read_text().splitlines()
    assert said[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert said[-2:] == ["--deadline-remaining-seconds", "110"]


def test_google_says_true_when_it_takes_a_machine_back(metadata, ray_calls):
    service = metadata((200, "FALSE\n"), (200, "TRUE\n"))
    cloud = Cloud("gcp", f"{service.url}/preempted", headers={"Metadata-Flavor": "Google"})
    watch(cloud, look_seconds=0.01)
    assert [headers["Metadata-Flavor"] for headers in service.asked] == ["Google", "Google"]
    assert ray_calls.exists()


def test_a_machine_at_home_is_in_no_cloud():
    assert not Cloud("aws", "http://127.0.0.1:9/notice").is_here()


def test_the_command_that_is_called_is_one_that_ray_has():
    from ray.scripts.scripts import drain_node

    options = {option for parameter in drain_node.params for option in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
