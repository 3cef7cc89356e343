"""The command line says what it did, where it is wrong, and ends with the right code."""

import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import jobs.cli
from pipeline.corpus import Corpus

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def capfilt(capsys):
    """Run one command in this process; return its exit code, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            jobs.cli.main([str(each) for each in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose images lie on disk, so that no server is needed."""
    (tmp_path / "cats.tsv").write_text("a cat\thttp://127.0.0.1:1/a.jpg\nno url\n")
    path = tmp_path / "pets.yaml"
    path.write_text(
        f"name: pets\nroot: {tmp_path}/corpus\n"
        f"sources: [{{name: cats, format: cc3m, paths: [{tmp_path}/cats.tsv]}}]\n"
    )
    return path


def test_help_lists_the_job_in_order(capfilt):
    code, out, _ = capfilt("--help")
    assert code == 0
    places = [out.index(f" {name} ") for name in ("demo", "run", "download", "retry", "verify")]
    assert places == sorted(places)


@pytest.mark.parametrize("command", ["demo", "run", "download", "retry", "verify", "schema"])
def test_every_command_shows_an_example(capfilt, command):
    code, out, _ = capfilt(command, "--help")
    assert code == 0
    assert f"Example: capfilt {command}" in out


def test_a_dry_run_prints_recipe_and_plan_and_writes_nothing(capfilt, recipe, tmp_path):
    code, out, _ = capfilt("run", recipe, "--dry-run", "--set", "download.min_side_px=77")
    assert code == 0
    assert "min_side_px: 77" in out
    assert f"below {tmp_path}/corpus" in out
    assert "download cats: 2 rows in 1 shards of up to 10,000, 0 of them done" in out
    assert not (tmp_path / "corpus").exists()


def test_a_dry_run_for_machines_is_json(capfilt, recipe):
    code, out, _ = capfilt("download", recipe, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["stages"][0]["rows"] == 2
    assert plan["recipe"]["name"] == "pets"


def test_a_download_counts_every_row_with_its_reason(capfilt, recipe, tmp_path):
    code, out, err = capfilt("run", recipe, "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["shards_new"] == 1
    assert summary["not_kept"] == {
        "dropped: port_refused": 1,
        "failed: too_few_columns": 1,
    }
    assert "download: 2/2 rows (100%)" in err
    code, out, _ = capfilt("verify", tmp_path / "corpus")
    assert (code, out) == (0, "0 faults in 1 raw shards (every byte and row checked)\n")


def test_the_same_command_again_finds_nothing_to_do(capfilt, recipe):
    capfilt("run", recipe)
    code, out, _ = capfilt("run", recipe)
    assert code == 0
    assert out == "1 shards done, 0 of them now\n"


def test_another_recipe_on_the_same_root_is_refused_by_key(capfilt, recipe):
    capfilt("run", recipe)
    code, _, err = capfilt("run", recipe, "--set", "download.min_side_px=99")
    assert code == 2
    assert "download.min_side_px: 1 in run.yaml, 99 now" in err
    code, _, _ = capfilt("run", recipe, "--set", "download.num_threads=2")
    assert code == 0


def test_shards_of_another_recipe_are_refused_even_without_run_yaml(capfilt, recipe, tmp_path):
    capfilt("run", recipe)
    (tmp_path / "corpus" / "run.yaml").unlink()
    code, _, err = capfilt("run", recipe, "--set", "download.min_side_px=99")
    assert code == 2
    assert "shard raw/cats/00000 was made by another recipe" in err


def test_lists_that_got_shorter_are_refused(capfilt, recipe, tmp_path):
    capfilt("run", recipe, "--set", "download.rows_per_shard=1")
    (tmp_path / "cats.tsv").write_text("a cat\thttp://127.0.0.1:1/a.jpg\n")
    code, _, err = capfilt("run", recipe, "--set", "download.rows_per_shard=1")
    assert code == 2
    assert "shard raw/cats/00001 was made from 1 rows, its lists now give it 0" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["run", "RECIPE", "--set", "downlod.x=1"], "did you mean 'download'?"),
        (["run", "RECIPE", "--set", "sources.cats.paths=[gone.tsv]"], "gone.tsv"),
        (["retry", "RECIPE", "--only", "some"], "--only some: neither 'transient' nor 'all'"),
        (["verify", "nowhere"], "no corpus here"),
        (["run", "RECIPE", "--set", "root=nfs4://x"], "nfs4://x: Protocol not known"),
        (["run", "RECIPE", "--set", "root=gs://x"], "pip install 'capfilt[gcs]'"),
        (["frobnicate"], "frobnicate"),
        (["run"], "RECIPE"),
    ],
)
def test_wrong_input_ends_with_code_2_and_no_trace(capfilt, recipe, arguments, complaint):
    code, out, err = capfilt(*(recipe if each == "RECIPE" else each for each in arguments))
    assert code == 2
    assert complaint in err
    assert "Traceback" not in out + err


def test_a_root_that_cannot_be_written_is_told_in_a_line(capfilt, recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, err = capfilt("run", recipe, "--set", f"root={tmp_path}/file/corpus")
    assert code == 1
    assert "Not a directory" in err
    assert "Traceback" not in err


def test_a_disk_that_takes_no_more_ends_the_run_with_what_is_committed_safe(recipe, tmp_path):
    rows = "".join(f"caption {n} {'x' * 500}\thttp://10.0.0.1/{n}\n" for n in range(3000))
    (tmp_path / "cats.tsv").write_text(rows)
    capfilt = Path(sys.executable).with_name("capfilt")
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 1; exec {capfilt} run {recipe}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "what is committed is safe, the same command continues" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_ends_with_code_1_and_names_what_is_damaged(capfilt, recipe, tmp_path):
    capfilt("run", recipe)
    tar = tmp_path / "corpus" / "raw" / "cats" / "00000.tar"
    tar.write_bytes(b"\1" + tar.read_bytes()[1:])
    code, out, _ = capfilt("verify", tmp_path / "corpus")
    assert code == 1
    assert "fault raw/cats/00000.tar: " in out
    assert "delete raw/cats/00000.json and run again" in out
    code, out, _ = capfilt("verify", tmp_path / "corpus", "--json")
    assert code == 1
    assert json.loads(out)["is_well"] is False
    code, out, _ = capfilt("verify", tmp_path / "corpus", "--quick")
    assert (code, "markers, sizes and counts checked" in out) == (0, True)


def test_a_shard_that_fails_is_set_aside_and_made_by_the_same_command(capfilt, recipe, tmp_path):
    dogs = tmp_path / "dogs.tsv"
    dogs.write_text("a dog\thttp://127.0.0.1:1/d.jpg\n")

    class Vandal(BaseHTTPRequestHandler):
        """Takes away the next source's list while the first one is downloaded."""

        def do_GET(self):  # noqa: N802 (the library's name)
            dogs.write_text("")
            self.send_error(404)

        def log_message(self, *args):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Vandal) as server:
        threading.Thread(target=server.serve_forever).start()
        port = server.server_address[1]
        (tmp_path / "cats.tsv").write_text(f"a cat\thttp://127.0.0.1:{port}/a.jpg\n")
        recipe.write_text(
            recipe.read_text().replace(
                "]}]", f"]}}, {{name: dogs, format: cc3m, paths: [{dogs}]}}]"
            )
            + f"fetch: {{allowed_networks: [127.0.0.1/32], allowed_ports: [{port}]}}\n"
        )
        code, out, _ = capfilt("run", recipe, "--set", f"root={tmp_path / 'my corpus'}")
        server.shutdown()
    assert code == 1
    assert "failed raw/dogs/00000: " in out
    dogs.write_text("a dog\thttp://127.0.0.1:1/d.jpg\n")
    again = shlex.split(out.split("to try them again: ")[1].splitlines()[0])
    assert again[:2] == ["capfilt", "run"]
    code, out, _ = capfilt(*again[1:])  # as a person would paste it
    assert (code, "2 shards done, 1 of them now" in out) == (0, True)


def test_retry_fetches_what_failed_and_touches_nothing_else(capfilt, recipe, tmp_path):
    is_well, asked = threading.Event(), []
    picture = cv2.imencode(".png", np.full((64, 64, 3), 200, np.uint8))[1].tobytes()

    class Recovering(BaseHTTPRequestHandler):
        """Has one page that answers at once, and one that is unavailable at first."""

        def do_GET(self):  # noqa: N802 (the library's name)
            asked.append(self.path)
            if self.path == "/late" and not is_well.is_set():
                return self.send_error(503)
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture)))
            self.end_headers()
            return self.wfile.write(picture)

        def log_message(self, *args):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Recovering) as server:
        threading.Thread(target=server.serve_forever).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        (tmp_path / "cats.tsv").write_text(f"a cat\t{base}/now\na late cat\t{base}/late\n")
        sets = [
            "--set",
            "fetch.allowed_networks=[127.0.0.1/32]",
            "--set",
            "fetch.allowed_ports=any",
        ]
        sets += ["--set", "fetch.retry.max_attempts=1"]
        assert json.loads(capfilt("run", recipe, *sets, "--json")[1])["kept"] == 1
        is_well.set()
        asked.clear()
        code, out, _ = capfilt("retry", recipe, *sets, "--json")
        server.shutdown()
    assert (code, json.loads(out)["kept"], asked) == (0, 1, ["/late"])
    assert capfilt("verify", tmp_path / "corpus")[0] == 0
    record = Corpus(str(tmp_path / "corpus")).record("raw", "cats", 0)
    assert (record.counts.kept, record.counts.failed) == (2, {})


def test_a_corpus_on_s3_is_made_verified_and_resumed(capfilt, recipe, monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="pets")
    try:
        code, out, _ = capfilt("run", recipe, "--set", "root=s3://pets/corpus")
        assert (code, "1 shards done, 1 of them now" in out) == (0, True)
        code, out, _ = capfilt("verify", "s3://pets/corpus")
        assert (code, out) == (0, "0 faults in 1 raw shards (every byte and row checked)\n")
        code, out, _ = capfilt("run", recipe, "--set", "root=s3://pets/corpus")
        assert (code, out) == (0, "1 shards done, 0 of them now\n")
    finally:
        server.stop()


def test_the_installed_command_is_this_one():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("capfilt")), "schema"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["title"] == "capfilt recipe"
    assert done.stderr == ""


def test_every_command_in_the_readme_exists(capfilt):
    commands = set(re.findall(r"capfilt ([a-z]+)", README.read_text()))
    assert commands >= {"demo", "run", "download", "retry", "verify"}
    for command in commands - {"turns", "is"}:
        assert capfilt(command, "--help")[0] == 0, command
