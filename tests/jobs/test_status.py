"""Status tells the truth from the corpus alone: whoever ran it, is running it or has died."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from jobs.durable import FILE, Driver, FailedShard, RunStatus, StageStatus
from jobs.errors import UserError
from jobs.status import read_status, status_text


def now():
    return datetime.now(UTC)


def write_status(root, **changes):
    values = {
        "name": "pets",
        "command": "capfilt submit pets.yaml",
        "driver": Driver(id="1", who="ann@far, process 7", machine="far away", pid=7),
        "started_at": now() - timedelta(hours=3),
        "heartbeat_at": now() - timedelta(seconds=5),
        "heartbeat_seconds": 10,
        "stale_seconds": 60,
        "stages": (
            StageStatus(
                stage="download",
                folder="raw",
                shards_total=40,
                shards_done=1,
                rows_per_second=12.5,
                kept_share=0.75,
                eta_seconds=7200,
            ),
            StageStatus(stage="score", folder="captions", shards_total=40, shards_done=0),
        ),
    }
    status = RunStatus.model_validate(values | changes)
    path = f"{root}/{FILE}"
    fs, _ = fsspec.url_to_fs(root)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fsspec.open(path, "wb") as stream:
        stream.write(status.model_dump_json().encode())
    return status


def write_markers(root, number, stage="raw"):
    """Write what a listing shows of shards; status opens none of it."""
    for index in range(number):
        with fsspec.open(f"{root}/{stage}/web/{index:05d}.json", "wb", auto_mkdir=True) as stream:
            stream.write(b"{}")
    with fsspec.open(f"{root}/{stage}/web/00099.json.0123456789abcdef", "wb") as stream:
        stream.write(b"{}")  # a commit that was cut off: not a shard


@pytest.fixture(scope="module")
def bucket():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["disk", "memory", "s3"])
def root(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "corpus")
    elif request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    else:
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_what_exists_is_counted_now_and_not_when_the_driver_last_wrote(root):
    write_status(root)
    write_markers(root, 3)
    status = read_status(root, now())
    assert [(made.folder, made.num_shards) for made in status.made] == [("raw", 3)]
    assert abs(status.made[0].last_commit - now()) < timedelta(minutes=2)
    text = status_text(root)
    assert "run pets: running" in text
    assert "raw (download)    3/40" in text
    assert "captions (score)  0/40" in text
    assert "12.5" in text
    assert "75.0%" in text
    assert "2:00:00" in text
    assert "by ann@far, process 7, since" in text


def test_models_in_training_are_told_apart_from_trained_ones(root):
    write_status(root)
    for name in (
        "med/export/capfilt.json",
        "stage1/metrics.jsonl",
        "stage1/checkpoints/00000400/manifest.json",
        "stage1/checkpoints/00001200/manifest.json",
    ):
        with fsspec.open(f"{root}/train/{name}", "wb", auto_mkdir=True) as stream:
            stream.write(b"{}")
    text = status_text(root)
    assert "med: trained" in text
    assert "stage1: in training, last checkpoint at step 1,200, log 0:00:0" in text
    models = json.loads(status_text(root, as_json=True))["models"]
    assert models["stage1"]["checkpoint_step"] == 1200
    assert (models["med"]["is_done"], models["stage1"]["is_done"]) == (True, False)


def test_a_driver_that_fell_silent_has_died_and_its_rate_is_not_shown(root):
    write_status(root, heartbeat_at=now() - timedelta(hours=1))
    write_markers(root, 3)
    text = status_text(root)
    assert "run pets: died" in text
    assert "last heard of 1:00:" in text
    assert "12.5" not in text
    assert "to continue: capfilt submit pets.yaml" in text


def test_a_driver_of_this_machine_that_is_gone_has_died_at_once(tmp_path):
    program = "from jobs.durable import Driver; print(Driver.here().model_dump_json())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    write_status(str(tmp_path), driver=Driver.model_validate_json(done.stdout))
    assert read_status(str(tmp_path), now()).state == "died"


@pytest.mark.parametrize("condition", ["done", "stopped", "some shards failed", "broken off"])
def test_a_run_that_ended_says_how(root, condition):
    write_status(root, condition=condition, heartbeat_at=now() - timedelta(days=9))
    text = status_text(root)
    assert f"run pets: {condition}" in text
    assert ("to continue" in text) == (condition != "done")


def test_troubles_are_told_and_long_lists_cut_short(root):
    failures = tuple(
        FailedShard(shard=f"raw/web/{index:05d}", error="truncated", attempts=3)
        for index in range(30)
    )
    write_status(
        root,
        num_failures=30,
        failures=failures,
        warnings=("download: 3% of the last 500 rows kept",),
        bugs={"KeyError at line 3": 2},
        note="storage has failed every request for 900 s",
        condition="broken off",
    )
    text = status_text(root)
    assert "warning: download: 3% of the last 500 rows kept" in text
    assert "failed raw/web/00009 after 3 attempts: truncated" in text
    assert "raw/web/00010" not in text
    assert "... and 20 shards more" in text
    assert "a bug, met 2 times: KeyError at line 3" in text
    assert "it ended with: storage has failed" in text
    document = json.loads(status_text(root, as_json=True))
    assert len(document["run"]["failures"]) == 30


def test_a_corpus_that_no_driver_wrote_of_is_counted_all_the_same(root):
    write_markers(root, 2)
    text = status_text(root)
    assert "never run" in text
    assert "raw    2" in text


def test_no_corpus_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match="no corpus here"):
        status_text(str(tmp_path))


def test_status_writes_nothing(tmp_path):
    write_status(str(tmp_path))
    write_markers(str(tmp_path), 2)
    before = {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*")}
    status_text(str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*")} == before
