"""Training under Ray Train: a worker that is killed is replaced, the end is the same."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_jobs import job, records, run_ranks, write_corpus

from jobs.checkpoint import Checkpoints
from jobs.training.exports import read_card

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from training_jobs import job
from jobs.pretrain import pretrain

if __name__ == "__main__":
    this = job({root!r}, {stage!r}, {options!r}, workers={workers!r})
    card = pretrain(this, lambda: False)
    assert card is not None
"""


def start(root, stage, options, **workers):
    program = PROGRAM.format(
        here=str(HERE), root=str(root), stage=stage, options=options, workers=workers
    )
    quiet = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(this, step, process):
    """Wait until a checkpoint of this step or a later one exists; return the steps there are."""
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        last = Checkpoints(this.open_store(), f"{this.folder}/checkpoints").latest()
        if last is not None and last.step >= step:
            return last.step
        time.sleep(0.05)


def workers_of(process):
    """Return the processes that Ray Train works with, below this one."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "stat").read_text().rsplit(") ", 1)[1].split()
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(status[1])

    def is_below(number):
        while number in parents:
            if number == process.pid:
                return True
            number = parents[number]
        return False

    return [n for n, name in names.items() if "RayTrainWorker" in name and is_below(n)]


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(tmp_path):
    options = {"micro_batch_size": 4, "num_steps": 60}
    killed, steady = (job(tmp_path / name, "med", options) for name in ("killed", "steady"))
    for root in ("killed", "steady"):
        write_corpus(tmp_path / root)
    run_ranks(multiprocessing.get_context("spawn"), steady, 2)
    process = start(killed.root, "med", options, num_workers=2, max_failures=3)
    reached = wait_for_step(killed, 4, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    assert reached < 60
    ours, theirs = (read_card(each.open_store(), "med") for each in (killed, steady))
    assert (ours.files, ours.losses) == (theirs.files, theirs.losses)
    assert records(killed) == records(steady)


def test_what_no_restart_mends_is_told_at_once(tmp_path):
    write_corpus(tmp_path)
    process = start(tmp_path, "captioner", {}, num_workers=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "captioner begins from med" in output
    assert not list((tmp_path / "train/captioner").glob("problem*"))
