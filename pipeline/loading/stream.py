"""Requests in, batches out, in the same order: torch's DataLoader around the batch maker."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from pipeline.loading.batch import BatchFailure, BatchRequest, TrainingBatch
from pipeline.loading.config import LoaderConfig
from pipeline.loading.maker import BatchMaker

Answer = TrainingBatch | BatchFailure


class Requests(Sampler[BatchRequest]):
    """What DataLoader asks which item is next."""

    def __init__(self, begin: Callable[[], Iterator[BatchRequest]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._begin()


def start_stream(
    maker: BatchMaker, requests: Callable[[], Iterator[BatchRequest]], config: LoaderConfig
) -> Iterator[Answer]:
    """Return the batches for an endless row of requests; its workers end when it is dropped."""
    context = None
    if config.num_workers:
        # A fork of a process with threads and a CUDA context may hang; this forks a clean one.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([BatchMaker.__module__])
    loader: DataLoader[Answer] = DataLoader(
        maker,
        batch_size=None,  # each item is a batch already
        sampler=Requests(requests),
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_batches if config.num_workers else None,
        multiprocessing_context=context,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare_worker,
        pin_memory=config.has_pinned_memory,
        # Its own, or starting it would draw from the generator that training draws from.
        generator=torch.Generator(),
    )
    return iter(loader)


def _as_it_is(answer: Any) -> Any:  # noqa: ANN401  (what DataLoader takes for any item)
    return answer


def is_lost_worker(error: Exception) -> bool:
    """Say whether an error of `next` tells that a worker is gone, rather than what it raised.

    The process that died may have told of a batch whose memory can no longer be asked for.
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in text


def _prepare_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to answer
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when training's does: DataLoader watches only the server that forked it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)  # nobody is left to tell; the other threads may be waiting for ever
