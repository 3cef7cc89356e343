"""Submitting to a real Ray head: attach, refuse, stop, continue, and outlive the head."""

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import yaml
from PIL import Image

from jobs.errors import UserError
from jobs.job_server import JobServer
from jobs.recipe import load_recipe
from jobs.run import download
from jobs.submit import follow_run, last_attempt, list_text, stop_run, submit_run
from pipeline.corpus import Corpus
from pipeline.verify import verify

BIN = Path(sys.executable).parent
NUM_IMAGES, PER_SHARD = 24, 4
AGAIN = "capfilt submit pets.yaml"


class Head:
    """A Ray head of its own with a dashboard on loopback, which can be killed and started anew."""

    def __init__(self, folder, token_path):
        self.folder, self.token_path = folder, token_path
        self.process = None

    def start(self):
        port, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
        command += ["--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0"]
        command += [f"--temp-dir={self.folder}", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats"]
        environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "OMP_NUM_THREADS": "1",
        }
        self.log = open(Path(self.folder, "head.log"), "ab")  # noqa: SIM115 (lives as long)
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        wait_until(self.answers, 60, f"a head; see {self.log.name}")

    def answers(self):
        assert self.process.poll() is None, Path(self.log.name).read_text()[-2000:]
        try:
            header = {"Authorization": f"Bearer {self.token_path.read_text()}"}
            return requests.get(f"{self.address}/api/jobs/", headers=header, timeout=5).ok
        except requests.RequestException:
            return False

    def kill(self):
        """End the machine, as it were: every process of the head at once, drivers included."""
        root = psutil.Process(self.process.pid)
        everyone = [root, *root.children(recursive=True)]
        for each in everyone:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(everyone, timeout=20)
        self.process.wait(20)
        self.log.close()
        self.process = None


class Web:
    """Serves images on loopback, a given number of them; who asks for more has to wait."""

    def __init__(self):
        self.images = [jpeg(index) for index in range(NUM_IMAGES)]
        self.num_served, self.limit = 0, NUM_IMAGES
        self.changed = threading.Condition()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index = int(self.path.strip("/").removesuffix(".jpg"))
                with web.changed:
                    web.changed.wait_for(lambda: web.num_served < web.limit, 120)
                    web.num_served += 1
                    web.changed.notify_all()
                self.send_response(200)
                self.send_header("Content-Type", "image/jpeg")
                self.send_header("Content-Length", str(len(web.images[index])))
                self.end_headers()
                self.wfile.write(web.images[index])

            def log_message(self, *arguments):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:
                    return  # the client was killed

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def allow(self, limit):
        with self.changed:
            self.num_served, self.limit = 0, limit
            self.changed.notify_all()

    def wait_until_served(self, number):
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_served >= number, 60)


def jpeg(index):
    pixels = np.random.default_rng(index).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{seconds} s without {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def head():
    # A socket's path has to be short, which tmp_path is not.
    folder = Path(tempfile.mkdtemp(prefix="cf-", dir="/tmp"))
    token_path = folder / "token"
    token_path.write_text(secrets.token_hex(32))
    token_path.chmod(0o600)
    started = Head(folder, token_path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token_path))
        try:
            started.start()
        except (OSError, AssertionError) as error:
            pytest.skip(f"no Ray head can be started here: {error}")
        try:
            yield started
        finally:
            if started.process is not None:
                started.kill()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def web():
    served = Web()
    yield served
    served.allow(10**9)
    served.server.shutdown()
    served.server.server_close()


def write_recipe(folder, port):
    urls = "".join(
        f"http://127.0.0.1:{port}/{index}.jpg,a picture\n" for index in range(NUM_IMAGES)
    )
    (folder / "list.csv").write_text("url,caption\n" + urls)
    recipe = {
        "name": folder.name.replace("_", "-")[:40],
        "root": str(folder / "corpus"),
        "sources": [{"name": "web", "format": "table", "paths": [str(folder / "list.csv")]}],
        "fetch": {
            "allowed_networks": ["127.0.0.1/32"],
            "allowed_ports": [port],
            "timeout_seconds": 60,
            "total_seconds": 120,
        },
        "run": {"heartbeat_seconds": 0.5},
        "download": {
            "rows_per_shard": PER_SHARD,
            "num_threads": 1,
            "image_size_px": 48,
            "min_side_px": 16,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture
def recipe_path(web, tmp_path):
    web.allow(NUM_IMAGES)
    return write_recipe(tmp_path, web.port)


@pytest.fixture(scope="module")
def undisturbed(web, tmp_path_factory):
    """Return the hashes of a corpus that one process made here, undisturbed."""
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("undisturbed"), web.port))
    download(recipe, lambda: False)
    return digests(recipe.root)


def capfilt(*arguments):
    return subprocess.run(
        [str(BIN / "capfilt"), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def digests(root):
    """Return the hash of every file of a corpus but run.yaml and the run's diary."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for stage in ("raw", "captions", "clean")
        for path in sorted(Path(root, stage).rglob("*"))
        if path.is_file()
    }


def status(root):
    done = capfilt("status", root, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def num_shards(root):
    return len(Corpus(root).shards("raw"))


def test_whoever_has_no_token_is_refused(head, monkeypatch, tmp_path):
    jobs = f"{head.address}/api/jobs/"
    assert requests.get(jobs, timeout=10).status_code == 401
    assert requests.get(jobs, headers={"Authorization": "Bearer x"}, timeout=10).status_code == 403
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    with pytest.raises(UserError, match="Authentication required.*RAY_AUTH_TOKEN_PATH"):
        JobServer(head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match="Authentication failed.*RAY_AUTH_TOKEN_PATH"):
        JobServer(head.address)


def test_the_dashboard_listens_on_loopback_alone(head):
    port = int(head.address.rsplit(":", 1)[1])
    addresses = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


def test_submitting_what_runs_attaches_whoever_does_it(head, web, recipe_path, undisturbed):
    web.allow(PER_SHARD)
    recipe = load_recipe(recipe_path)
    with ThreadPoolExecutor(3) as pool:
        raced = list(
            pool.map(lambda _: submit_run(JobServer(head.address), recipe, AGAIN), range(3))
        )
    assert sorted(each.is_new for each in raced) == [False, False, True]
    assert len({each.attempt.id for each in raced}) == 1
    web.wait_until_served(PER_SHARD)
    command = [str(BIN / "capfilt"), "submit", recipe_path, "--address", head.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attached:
        assert attached.stdout.readline().endswith("attempt 1 is RUNNING; attached\n")
        web.allow(NUM_IMAGES)
        log = attached.stdout.read()
    assert attached.returncode == 0, log
    assert f"{NUM_IMAGES // PER_SHARD} shards done" in log
    listed = capfilt("list", "--address", head.address).stdout
    assert f"{recipe.name}  1        SUCCEEDED" in listed
    assert digests(recipe.root) == undisturbed


def test_a_name_or_a_root_in_use_is_not_given_to_another_recipe(head, web, recipe_path):
    web.allow(1)
    recipe, server = load_recipe(recipe_path), JobServer(head.address)
    first = submit_run(server, recipe, AGAIN)
    assert first.is_new
    assert "every node has to mount it" in first.note
    slower = load_recipe(recipe_path, ["download.num_threads=2"])
    assert "pace" in submit_run(server, slower, AGAIN).note
    other = load_recipe(recipe_path, ["seed=1"])
    with pytest.raises(UserError, match="with another recipe"):
        submit_run(server, other, AGAIN)
    namesake = load_recipe(recipe_path, ["name=another-name"])
    with pytest.raises(UserError, match=f"is being written by run '{recipe.name}'"):
        submit_run(server, namesake, AGAIN)
    server.stop(first.attempt.id)
    web.allow(NUM_IMAGES)


def test_a_stopped_run_drains_and_is_continued_by_submitting(head, web, recipe_path, undisturbed):
    web.allow(2 * PER_SHARD + 1)
    recipe, server = load_recipe(recipe_path), JobServer(head.address)
    submit_run(server, recipe, AGAIN)
    web.wait_until_served(2 * PER_SHARD + 1)
    stopper = threading.Timer(1, lambda: web.allow(NUM_IMAGES))  # the row in hand comes through
    stopper.start()
    stopped = stop_run(server, recipe.name)
    stopper.join()
    assert stopped.status == "STOPPED"
    assert "stopped" in server.log(stopped.id)  # its own last words, so it was not killed
    assert 2 <= num_shards(recipe.root) < NUM_IMAGES // PER_SHARD
    with pytest.raises(UserError, match="does not run: attempt 1 STOPPED"):
        stop_run(server, recipe.name)
    web.allow(NUM_IMAGES)
    resumed = submit_run(server, recipe, AGAIN)
    assert (resumed.is_new, resumed.attempt.number) == (True, 2)
    assert follow_run(server, resumed.attempt) == 0
    assert last_attempt(server, recipe.name).id == resumed.attempt.id
    assert list_text(server).count(recipe.name) >= 2
    assert digests(recipe.root) == undisturbed


def test_a_run_outlives_its_head(head, web, recipe_path, undisturbed):
    web.allow(2 * PER_SHARD + 1)
    recipe = load_recipe(recipe_path)
    submitted = capfilt("submit", recipe_path, "--no-wait", "--address", head.address)
    assert submitted.returncode == 0, submitted.stderr
    web.wait_until_served(2 * PER_SHARD + 1)
    wait_until(lambda: status(recipe.root)["run"]["stages"], 30, "a heartbeat")
    assert status(recipe.root)["state"] == "running"
    head.kill()
    gone = capfilt("logs", recipe.name, "--address", head.address)
    assert gone.returncode == 2
    assert "no Ray head answers" in gone.stderr
    left = status(recipe.root)
    assert (left["state"], left["shards"]["raw"]["made"]) == ("died", num_shards(recipe.root))
    assert left["run"]["command"] == f"capfilt submit {recipe_path} --address {head.address}"
    assert left["run"]["engine"] == "ray"
    head.start()
    with pytest.raises(UserError, match="on this head.*capfilt status"):
        last_attempt(JobServer(head.address), recipe.name)
    web.allow(NUM_IMAGES)
    resumed = capfilt("submit", recipe_path, "--address", head.address)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert digests(recipe.root) == undisturbed
    assert list(verify(Corpus(recipe.root))) == []
    assert status(recipe.root)["state"] == "done"
