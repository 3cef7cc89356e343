"""Training that is killed, resumed and resized ends as training that was left alone."""

import multiprocessing
import random
import shutil
import signal
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path

import pytest
from training_jobs import CPU, NUM_STEPS, alone, job, killed_after, records, run_ranks, write_corpus

from jobs.checkpoint import Checkpoints
from jobs.training.context import TrainContext
from jobs.training.data import on_device
from jobs.training.exports import read_card
from jobs.training.session import open_session

STAGES = ("med", "stage1", "stage2")


@pytest.fixture(scope="session")
def processes():
    """Processes that start from one in which all is imported and no thread runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_jobs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # all it knows of where to import
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A root in which every stage was trained without a break."""
    root = tmp_path_factory.mktemp("undisturbed") / "corpus"
    write_corpus(root)
    for stage in ("med", "captioner", "filter", "stage1", "stage2"):
        alone(job(root, stage))
    return root


def fresh(undisturbed, tmp_path, *without):
    """Return a copy of the trained root in which some stages were not trained."""
    root = tmp_path / "corpus"
    shutil.copytree(undisturbed, root)
    for stage in without:
        shutil.rmtree(root / "train" / stage)
    return root


def weights(root, stage):
    """Return the hashes of the exported files, and of the last checkpoint's."""
    this = job(root, stage)
    last = Checkpoints(this.open_store(), f"{this.folder}/checkpoints").latest()
    assert last.step == NUM_STEPS
    exported = read_card(this.open_store(), stage).files
    return exported, {name: file.sha256 for name, file in last.files.items()}


def run(processes, target, *arguments):
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def assert_same_end(root, undisturbed, stage):
    assert records(job(root, stage)) == records(job(undisturbed, stage))
    assert weights(root, stage) == weights(undisturbed, stage)


def kill_at_random(processes, this, num_kills):
    """Kill so many processes, each before it could finish alone."""
    rng = random.Random(this.stage)
    longest = (NUM_STEPS - 1) // num_kills
    for _ in range(num_kills):
        assert run(processes, killed_after, this, rng.randint(1, longest)) == -signal.SIGKILL


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_steps_it_ends_with_the_same_bits(stage, undisturbed, tmp_path, processes):
    root = fresh(undisturbed, tmp_path, stage)
    kill_at_random(processes, job(root, stage), num_kills=3)
    assert run(processes, alone, job(root, stage)) == 0
    assert_same_end(root, undisturbed, stage)


def test_stopped_between_two_records_it_writes_the_same_records(undisturbed, tmp_path):
    root = fresh(undisturbed, tmp_path, "captioner")
    answers = iter([False, False, False, True])
    assert alone(job(root, "captioner"), lambda: next(answers)) is None
    assert alone(job(root, "captioner")) is not None
    assert_same_end(root, undisturbed, "captioner")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_ten_times_it_ends_with_the_same_bits(stage, undisturbed, tmp_path, processes):
    options = {"num_steps": 40}
    steady = job(fresh(undisturbed, tmp_path / "steady", stage), stage, options)
    alone(steady)
    killed = job(fresh(undisturbed, tmp_path / "killed", stage), stage, options)
    rng = random.Random(stage)
    for _ in range(10):
        assert run(processes, killed_after, killed, rng.randint(1, 3)) == -signal.SIGKILL
    alone(killed)
    assert records(killed) == records(steady)
    ours, theirs = (read_card(each.open_store(), stage) for each in (killed, steady))
    assert ours.files == theirs.files


@pytest.mark.parametrize("stage", ["med", "captioner", "stage2"])
def test_two_workers_train_as_one_that_accumulates_two_micro_batches(
    stage, undisturbed, tmp_path, processes
):
    options = {"micro_batch_size": 4}
    one = job(fresh(undisturbed, tmp_path / "one", stage), stage, options)
    two = job(fresh(undisturbed, tmp_path / "two", stage), stage, options)
    alone(one)
    run_ranks(processes, two, 2)
    assert_close(records(two), records(one))


def test_the_contrast_of_stage1_spans_all_workers(undisturbed, tmp_path, processes):
    options = {"num_steps": 1, "warmup_steps": 0, "dropout": 0.0}
    one = job(fresh(undisturbed, tmp_path / "one", "stage1"), "stage1", options)
    two = job(fresh(undisturbed, tmp_path / "two", "stage1"), "stage1", options)
    alone(one)
    run_ranks(processes, two, 2)
    assert records(two)[0]["itc"] == pytest.approx(records(one)[0]["itc"], abs=1e-5)


def test_stage1_exported_and_read_again_has_the_same_losses(undisturbed, tmp_path):
    root = fresh(undisturbed, tmp_path)
    export = shutil.copytree(root / "train/stage1/export", tmp_path / "export")
    last = first_losses(job(root, "stage1"), is_resumed=True)
    again = first_losses(job(root, "stage1", {"start_from": str(export)}), is_resumed=False)
    assert again == pytest.approx(last, abs=1e-5)


def first_losses(this, *, is_resumed):
    """Return the losses of the first batch, with the last checkpoint's weights or the first."""
    with ExitStack() as stack:
        session = open_session(this, TrainContext(CPU), stack)
        if is_resumed:
            session.resume()
        loader = session.loader.at(0)
        batch = on_device(loader, next(loader), session.built.objective, CPU)
        losses = session.stepper.update(0, [batch], session.pieces)
    return {name: float(value) for name, value in losses.items()}


def test_from_one_worker_to_two_and_back_the_losses_stay(undisturbed, tmp_path, processes):
    options = {"micro_batch_size": 4}
    steady = job(fresh(undisturbed, tmp_path / "steady", "med"), "med", options)
    alone(steady)
    resized = job(fresh(undisturbed, tmp_path / "resized", "med"), "med", options)
    answers = iter([False, True])
    assert alone(resized, lambda: next(answers)) is None
    run_ranks(processes, resized, 2, is_short=True)
    alone(resized)
    assert_close(records(resized), records(steady))


def assert_close(ours, theirs):
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        numbers = {name for name, value in other.items() if isinstance(value, float)}
        assert {n: one[n] for n in numbers} == pytest.approx(
            {n: other[n] for n in numbers}, abs=1e-5
        )
