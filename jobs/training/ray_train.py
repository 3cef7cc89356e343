"""Training under Ray Train: a group of workers that is restarted and resized; the loop is the same.

Ray's own checkpoints are not used: what counts is in the corpus, where it is complete as soon as a
worker wrote it, and where a run without Ray goes on from it too.
"""

import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.errors import UserError
from jobs.pretrain import train
from jobs.training.config import WorkersConfig
from jobs.training.context import TrainContext
from jobs.training.gates import DivergedError
from jobs.training.job import TrainingJob

_log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 128 * 2**20  # tensors go through the process group; nothing through Ray


def train_on_ray(job: TrainingJob, address: str | None = None) -> None:
    """Train a stage with the recipe's workers, restarted and resized as nodes come and go.

    Connects to the cluster at `address`, uses the Ray that this process is connected to, or starts
    one on this machine. Raises UserError and DivergedError as `jobs.pretrain.train` does, and
    whatever ended the workers more often than the recipe allows.
    """
    launch = secrets.token_hex(8)
    with _connected(job.config.workers, address) as has_gpus, tempfile.TemporaryDirectory() as own:
        workers = job.config.workers
        uses_gpu = has_gpus if workers.has_gpu is None else workers.has_gpu
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "launch": launch},
            scaling_config=scaling(workers, uses_gpu=uses_gpu),
            torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
            run_config=RunConfig(
                name=f"{job.stage}-{launch}",
                storage_path=own,
                failure_config=FailureConfig(max_failures=workers.max_failures),
            ),
        )
        trainer.fit()
    _raise_problem(job, launch)


def scaling(workers: WorkersConfig, *, uses_gpu: bool) -> ScalingConfig:
    """Return what Ray is asked for; with a range of workers it starts again with those it finds."""
    possible = workers.possible
    number: Any = workers.num_workers  # Ray's own annotation has no place for a range
    if len(possible) > 1:
        number = possible[0], possible[-1]
    return ScalingConfig(
        num_workers=number,
        use_gpu=uses_gpu,
        resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": 1} if uses_gpu else {}),
    )


def _work(told: dict[str, Any]) -> None:
    """Train as one worker. Ray calls this again, in a new group, when a worker or node is lost.

    What no restart mends is written down instead of raised, for Ray would try it again; the others
    of the group find the note when they are restarted, and end too.
    """
    job, launch = told["job"], told["launch"]
    note, store = _note(job, launch), job.open_store()
    if store.read(note) is not None:
        return
    ranks = ray.train.get_context()
    context = TrainContext(
        ray.train.torch.get_device(), ranks.get_world_rank(), ranks.get_world_size()
    )
    try:
        train(context, job)
    except (UserError, DivergedError) as error:
        problem = {"kind": type(error).__name__, "message": str(error)}
        store.make_folder(job.folder)
        store.create(note, json.dumps(problem).encode())


def _note(job: TrainingJob, launch: str) -> str:
    return f"{job.folder}/problem.{launch}.json"


def _raise_problem(job: TrainingJob, launch: str) -> None:
    """Raise what a worker wrote down, if one did."""
    store, note = job.open_store(), _note(job, launch)
    data = store.read(note)
    if data is None:
        return
    store.remove(note)
    problem = json.loads(data)
    kinds = {each.__name__: each for each in (UserError, DivergedError)}
    raise kinds.get(problem["kind"], UserError)(problem["message"])


@contextmanager
def _connected(workers: WorkersConfig, address: str | None) -> Iterator[bool]:
    """Connect to Ray until left; give whether there are GPUs."""
    is_ours = not ray.is_initialized()
    if is_ours:
        _start(workers, address)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield resources.get("GPU", 0) > 0
    finally:
        if is_ours:
            ray.shutdown()


def _start(workers: WorkersConfig, address: str | None) -> None:
    if address is not None:
        ray.init(address=address, logging_level=logging.ERROR)
        return
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one to the home
    wanted = int(workers.num_workers * workers.cpus_per_worker) + 1
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, wanted),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
