"""One driver a corpus; and the status says who it is, also when it can say nothing any more."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import boto3
import pytest
from moto.server import ThreadedMotoServer

from jobs.durable import (
    FILE,
    Condition,
    Driver,
    RunStatus,
    RunTakenError,
    count_shards,
    driving,
    read_status,
)
from jobs.run_config import RunConfig
from pipeline.corpus import Corpus

QUICK = RunConfig(heartbeat_seconds=0.05, stale_seconds=0.5)
SLOW = RunConfig()


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    boto3.client("s3", **keys, **client).create_bucket(Bucket="runs")
    yield {"key": "test", "secret": "test", "client_kwargs": client}
    server.stop()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "corpus"), None
    return f"s3://runs/{tmp_path.name}", request.getfixturevalue("s3")


@pytest.fixture
def corpus(place):
    return Corpus(*place)


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def abandoned(corpus, *, age_seconds, machine="elsewhere", pid=1):
    """Leave the status of a driver that was last heard of some time ago."""
    then = datetime.now(UTC) - timedelta(seconds=age_seconds)
    driver = Driver(id="other", who="ann@elsewhere, process 7", machine=machine, pid=pid)
    status = RunStatus(
        name="theirs",
        driver=driver,
        started_at=then,
        heartbeat_at=then,
        heartbeat_seconds=10,
        stale_seconds=60,
    )
    corpus.store.make_folder("run")
    assert corpus.store.create(FILE, status.model_dump_json().encode())


def test_a_second_driver_is_refused_with_who_and_since_when(corpus, place):
    with driving(corpus, SLOW, name="first") as heart:
        since = f"{heart.status.started_at:%Y-%m-%d %H:%M}"
        with pytest.raises(RunTakenError) as refused, driving(Corpus(*place), SLOW, name="second"):
            pytest.fail("two drivers")
    assert heart.status.driver.who in str(refused.value)
    assert since in str(refused.value)


def test_after_a_run_has_ended_the_next_one_starts_at_once(corpus):
    for name in ("first", "second"):
        with driving(corpus, SLOW, name=name):
            assert read_status(corpus).is_alive(datetime.now(UTC))
        assert read_status(corpus).condition is Condition.DONE
    assert read_status(corpus).name == "second"


def test_a_driver_that_was_not_heard_of_for_long_is_taken_over(corpus):
    abandoned(corpus, age_seconds=61)
    assert read_status(corpus).state(datetime.now(UTC)) == "died"
    with driving(corpus, SLOW, name="ours"):
        assert read_status(corpus).name == "ours"


def test_a_driver_elsewhere_that_was_heard_of_lately_is_not(corpus):
    abandoned(corpus, age_seconds=30)
    with pytest.raises(RunTakenError, match="give the command again in 30 s"):
        driving(corpus, SLOW, name="ours").__enter__()


def test_a_driver_whose_process_is_gone_from_this_machine_is_taken_over_at_once(corpus):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    abandoned(corpus, age_seconds=1, machine=Driver.here().machine, pid=gone.pid)
    assert read_status(corpus).state(datetime.now(UTC)) == "died"
    with driving(corpus, SLOW, name="ours"):
        assert read_status(corpus).name == "ours"


def test_of_drivers_that_take_over_at_the_same_time_one_wins(corpus, place):
    abandoned(corpus, age_seconds=100)
    barrier, leave = threading.Barrier(4), threading.Event()
    others = [Corpus(*place) for _ in range(4)]

    def race(number):
        barrier.wait()
        try:
            with driving(others[number], SLOW, name=f"driver{number}"):
                leave.wait(20)
                return True
        except RunTakenError:
            return False

    with ThreadPoolExecutor(4) as pool:
        racing = [pool.submit(race, number) for number in range(4)]
        wait_until(lambda: sum(each.done() for each in racing) == 3)
        leave.set()
        assert sorted(each.result() for each in racing) == [False, False, False, True]


def test_the_heart_beats_and_tells_what_it_was_told(corpus):
    with driving(corpus, QUICK, name="beating") as heart:
        first = read_status(corpus).heartbeat_at
        heart.tell(warnings=("look at this",))
        wait_until(lambda: read_status(corpus).warnings == ("look at this",))
        assert read_status(corpus).heartbeat_at > first


def test_a_driver_that_was_taken_over_notices_and_leaves_the_others_status_alone(corpus, place):
    with driving(corpus, QUICK, name="paused") as heart:
        other = Corpus(*place)
        found = other.store.read(FILE)
        theirs = RunStatus.model_validate_json(found).model_copy(update={"name": "theirs"})
        while not other.store.swap(FILE, found, theirs.model_dump_json().encode()):
            found = other.store.read(FILE)  # it has just beaten
        wait_until(lambda: heart.is_lost)
    assert read_status(corpus).name == "theirs"
    assert read_status(corpus).condition is Condition.RUNNING


def test_a_run_that_breaks_off_says_why(corpus):
    with pytest.raises(KeyError), driving(corpus, SLOW, name="broken"):
        raise KeyError("what was looked for")
    status = read_status(corpus)
    assert status.condition is Condition.BROKEN
    assert "what was looked for" in status.note


def test_a_status_that_was_deleted_is_written_anew(corpus):
    with driving(corpus, QUICK, name="again"):
        corpus.store.remove(FILE)
        wait_until(lambda: read_status(corpus) is not None)


def test_a_damaged_status_stops_nobody(corpus):
    corpus.store.make_folder("run")
    corpus.store.create(FILE, b"{")
    with driving(corpus, SLOW, name="ours"):
        assert read_status(corpus).name == "ours"


def test_a_disk_that_is_full_stops_no_heart(tmp_path):
    """In a process of its own: the limit on file sizes is a process's."""
    program = """
import resource, signal, sys, time
from jobs.durable import driving
from jobs.run_config import RunConfig
from pipeline.corpus import Corpus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with driving(Corpus(sys.argv[1]), RunConfig(heartbeat_seconds=0.05, stale_seconds=1), name="x"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(0.3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stderr
    assert read_status(Corpus(str(tmp_path))).condition is Condition.DONE


def test_a_killed_driver_is_seen_to_be_dead_and_its_debris_is_tidied(tmp_path):
    program = """
import sys, time
from jobs.durable import driving
from jobs.run_config import RunConfig
from pipeline.corpus import Corpus
with driving(Corpus(sys.argv[1]), RunConfig(), name="victim"):
    print("driving", flush=True)
    time.sleep(60)
"""
    victim = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout.readline() == "driving\n"
    corpus = Corpus(str(tmp_path))
    assert read_status(corpus).state(datetime.now(UTC)) == "running"
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    (tmp_path / "run" / ".status.json.0123").write_text("half")
    assert read_status(corpus).state(datetime.now(UTC)) == "died"
    with driving(corpus, SLOW, name="next"):
        assert [each.name for each in (tmp_path / "run").iterdir()] == ["status.json"]


def test_shards_are_counted_from_listings(tmp_path):
    corpus = Corpus(str(tmp_path))
    folder = tmp_path / "raw" / "web"
    folder.mkdir(parents=True)
    for name in ("00000.json", "00001.json", "00001.tar", "00002.tar.0123456789abcdef"):
        (folder / name).touch()
    assert count_shards(corpus, "raw") == {"web": 2}
