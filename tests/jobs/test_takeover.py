"""Whoever continues a run waits until a dead driver's heartbeat is stale, and for no living one."""

import threading
import time
from datetime import UTC, datetime, timedelta

from jobs.durable import FILE, Driver, RunStatus
from jobs.takeover import wait_for_silence
from pipeline.corpus import Corpus


def beat(root, *, age=0.0, stale_seconds=60.0, condition="running"):
    status = RunStatus(
        name="pets",
        driver=Driver(id="1", who="ann@far, process 7", machine="far away", pid=7),
        condition=condition,
        started_at=datetime.now(UTC),
        heartbeat_at=datetime.now(UTC) - timedelta(seconds=age),
        heartbeat_seconds=1,
        stale_seconds=stale_seconds,
    )
    path = root / FILE
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(status.model_dump_json())
    path.with_suffix(".new").rename(path)


def test_a_corpus_that_nobody_ran_is_free(tmp_path):
    assert wait_for_silence(Corpus(str(tmp_path)), threading.Event())


def test_a_run_that_ended_is_free_at_once(tmp_path):
    beat(tmp_path, condition="stopped")
    assert wait_for_silence(Corpus(str(tmp_path)), threading.Event())


def test_a_dead_drivers_heartbeat_goes_stale(tmp_path):
    beat(tmp_path, stale_seconds=2.5)
    started = time.monotonic()
    assert wait_for_silence(Corpus(str(tmp_path)), threading.Event())
    assert 1.5 < time.monotonic() - started < 30


def test_a_living_driver_is_not_waited_for(tmp_path):
    beat(tmp_path, age=1.0)
    timer = threading.Timer(0.5, beat, (tmp_path,))
    timer.start()
    assert not wait_for_silence(Corpus(str(tmp_path)), threading.Event())
    timer.join()


def test_waiting_ends_when_it_has_to(tmp_path):
    beat(tmp_path)
    asked = threading.Event()
    timer = threading.Timer(0.3, asked.set)
    timer.start()
    assert not wait_for_silence(Corpus(str(tmp_path)), asked)
    timer.join()
