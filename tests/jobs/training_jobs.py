"""A tiny corpus and tiny training jobs, for tests and for the processes they start."""

import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from loader_corpora import human_item, photo, web_item, write_clean, write_web

from jobs.pretrain import train
from jobs.training.config import STAGES, TrainingConfig
from jobs.training.context import TrainContext
from jobs.training.job import TrainingJob
from jobs.training.logs import read_metrics
from pipeline.corpus import Corpus

CPU = torch.device("cpu")
HUMAN = ("coco",)
NUM_STEPS = 10


def write_corpus(root):
    """Commit 39 images of the web, 6 with human captions."""
    corpus = Corpus(str(root))
    write_web(corpus, "web", (13, 9, 17))
    write_web(corpus, "coco", (6,), make=human_item, first_photo=1000)
    return corpus


def config(stage_options=None, watch=None, **options):
    """Return a training section of tiny models and ten steps of eight pairs."""
    stage = {
        "preset": "tiny",
        "num_steps": NUM_STEPS,
        "global_batch_size": 8,
        "queue_size": 32,
        "warmup_steps": 2,
    }
    stages = {name: stage | (stage_options or {}) for name in STAGES}
    stages["stage1"] |= {"image_encoder": "trained"} | (stage_options or {})
    often = {
        "log_every_steps": 3,
        "checkpoint_every_steps": 2,
        "probe_every_steps": 5,
        "num_probe_samples": 6,
        "has_tensorboard": False,
    }
    shared = {
        "tokenizer": "corpus",
        "vocabulary_size": 256,
        "med_data": "clean",
        "held_out_share": 0.2,
        "num_loader_workers": 0,
    }
    return TrainingConfig.model_validate(
        shared | {"watch": often | (watch or {})} | stages | options
    )


def job(root, stage, stage_options=None, **options):
    return TrainingJob(
        root=str(root),
        stage=stage,
        config=config(stage_options, **options),
        seed=0,
        sources=(),
        human_sources=HUMAN,
    )


def alone(job, should_stop=lambda: False):
    """Train in this process, on one thread, as one rank."""
    torch.set_num_threads(1)
    return train(TrainContext(CPU), job, should_stop=should_stop)


def killed_after(job, num_steps):
    """Train until so many steps are done here, then die as a process does that is killed."""
    done = 0

    def die_when_due():
        nonlocal done
        done += 1
        if done == num_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    alone(job, die_when_due)


def as_rank(rank, world_size, job, port, is_short):
    """Train as one rank of a gloo group; if `is_short`, until it is first asked whether to stop."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    train(TrainContext(CPU, rank, world_size), job, should_stop=lambda: is_short)
    dist.destroy_process_group()


def run_ranks(processes, this, world_size, *, is_short=False):
    """Train as so many ranks at once, in processes of a multiprocessing context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        processes.Process(target=as_rank, args=(rank, world_size, this, port, is_short))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world_size


def records(job):
    """Return the records of a stage without its pace, which no two runs share."""
    rows = read_metrics(job.open_store(), job.folder)
    return [{name: value for name, value in row.items() if name != "pace"} for row in rows]


__all__ = ["human_item", "photo", "web_item", "write_clean"]
