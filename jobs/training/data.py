"""What a stage trains on: which shards, how images are changed, which samples are held out."""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import pyarrow.parquet as pq
import torch

from jobs.errors import UserError
from jobs.training.config import CORPUS_TOKENIZER, is_med
from jobs.training.context import TrainContext
from jobs.training.job import TrainingJob
from jobs.training.objectives import Batch, Objective, to_device
from jobs.training.plan import blip2_preset, med_preset, plan_stage
from jobs.training.texts import (
    TextTokenizer,
    load_tokenizer,
    tokenizer_from_vocabulary,
    vocabulary_of_words,
)
from pipeline.loader import Loader, LoaderConfig, LoaderError, TrainingBatch
from pipeline.loading.config import Augmentation, SourceConfig
from pipeline.loading.index import read_index
from pipeline.sample import canonical_json

_log = logging.getLogger(__name__)
VOCABULARY = "train/vocabulary.json"
_MAX_CAPTIONS = 2_000_000  # that a tokenizer is made of
_PROBE_BATCH = 32


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """How a rank's share of a step is cut."""

    size: int  # pairs in one
    count: int  # of one rank
    first: int  # number of this rank's first one in the global batch


def loader_config(job: TrainingJob, global_batch_size: int) -> LoaderConfig:
    """Return what the loader of a stage is asked for. Raises UserError for missing sources."""
    section, config = job.section, job.config
    augmentation = section.augmentation or (
        Augmentation.CROP_RANDAUGMENT if is_med(job.stage) else Augmentation.CROP
    )
    return LoaderConfig(
        stage=_stage(job),
        global_batch_size=global_batch_size,
        sources=_sources(job),
        seed=job.seed,
        holdout_fraction=config.held_out_share,
        image_size=image_size(job),
        augmentation=Augmentation(augmentation),
        max_words=30 if job.stage == "med" else 50,  # as released
        num_workers=config.num_loader_workers,
        has_pinned_memory=torch.cuda.is_available(),
        cache_folder=config.cache_folder,
    )


def _stage(job: TrainingJob) -> Literal["clean", "raw"]:
    """Return which shards a stage reads: before there are captioner and filter, none are clean.

    What people wrote is the same in both.
    """
    return job.config.med_data if is_med(job.stage) else "clean"


def _sources(job: TrainingJob) -> dict[str, SourceConfig]:
    """Return the sources and their shares.

    Captioner and filter are fine-tuned on human captions alone (BLIP, Sec. 3.3).
    """
    if job.section.sources is not None:
        return dict(job.section.sources)
    if job.stage not in ("captioner", "filter"):
        return {name: SourceConfig() for name in job.sources}
    if not job.human_sources:
        raise UserError(
            f"{job.stage} is fine-tuned on human captions, and the recipe has no source of them; "
            f"add one with origin: human (COCO), or name sources in training.{job.stage}.sources"
        )
    return {name: SourceConfig() for name in job.human_sources}


def image_size(job: TrainingJob) -> int:
    """Return the side of the images that the stage's model sees, in pixels."""
    section = job.section
    if section.image_size_px is not None:
        return section.image_size_px
    if not is_med(job.stage):
        return blip2_preset(job.stage, section).vision.image_size
    preset = med_preset(job.stage, section)
    return preset.vision.image_size if job.stage == "med" else preset.fine_tuned_image_size


def num_pairs(job: TrainingJob) -> int:
    """Return how many pairs one epoch holds. Raises UserError for a corpus without any."""
    try:
        config = loader_config(job, global_batch_size=1)
        index = read_index(job.open_corpus(), config)
    except LoaderError as error:
        raise UserError(str(error)) from error
    sizes = index.sizes(config)
    return int(sum(size.records_before(1) for size in sizes))


def cut(job: TrainingJob, global_batch_size: int, context: TrainContext) -> MicroBatches:
    """Return how a rank cuts its share into micro-batches. Raises UserError."""
    if global_batch_size % context.world_size:
        raise UserError(
            f"a global batch of {global_batch_size} cannot be shared equally by "
            f"{context.world_size} workers; set training.{job.stage}.global_batch_size to a "
            "multiple of every number of workers that training may go on with"
        )
    share = global_batch_size // context.world_size
    size = min(job.section.micro_batch_size or _common_share(job, global_batch_size), share)
    if share % size:
        raise UserError(
            f"a worker's share of {share} pairs is no multiple of training.{job.stage}."
            f"micro_batch_size {size}; choose one that divides it"
        )
    return MicroBatches(size, share // size, context.rank * share // size)


def _common_share(job: TrainingJob, global_batch_size: int) -> int:
    """Return the most pairs that every number of workers that is allowed can cut its share into.

    A group that shrinks then goes on with the same micro-batches, in no more memory.
    """
    return math.gcd(*(global_batch_size // number for number in job.config.workers.possible))


def check_workers(job: TrainingJob) -> None:
    """Raise UserError unless every number of workers that is allowed can share a batch."""
    batch = plan_stage(job.stage, job.section, num_pairs(job)).global_batch_size
    for world_size in job.config.workers.possible:
        cut(job, batch, TrainContext(torch.device("cpu"), 0, world_size))


def open_loader(
    job: TrainingJob, global_batch_size: int, context: TrainContext, pieces: MicroBatches
) -> Loader:
    """Return the loader of this rank. Raises UserError where there is nothing to train on."""
    try:
        return Loader(
            job.open_corpus(),
            loader_config(job, global_batch_size),
            rank=context.rank,
            world_size=context.world_size,
            micro_batches=pieces.count,
        )
    except LoaderError as error:
        raise UserError(str(error)) from error


def on_device(
    loader: Loader, batch: TrainingBatch, objective: Objective, device: torch.device
) -> Batch:
    """Return a batch of the loader as the model reads it."""
    text = objective.read_texts(batch.texts, batch.keys, batch.step)
    return Batch(
        pixels=loader.normalise(batch.pixels.to(device, non_blocking=True)),
        image_ids=batch.image_ids.to(device, non_blocking=True),
        text=to_device(text, device),
        texts=batch.texts,
    )


def held_out(job: TrainingJob, objective: Objective, device: torch.device) -> list[Batch]:
    """Return held-out batches for probes, always the same; none where too little is held out."""
    wanted = job.config.watch.num_probe_samples
    if not (job.config.held_out_share and job.config.watch.probe_every_steps):
        return []
    config = loader_config(job, global_batch_size=2).model_copy(
        update={"is_holdout": True, "augmentation": Augmentation.RESIZE, "num_workers": 0}
    )
    try:
        found = min(wanted, read_index(job.open_corpus(), config).num_records)
    except LoaderError as error:
        _log.warning("no probes: held_out_share holds too little out (%s)", error)
        return []
    size = min(_PROBE_BATCH, found)
    with Loader(job.open_corpus(), config.model_copy(update={"global_batch_size": size})) as loader:
        return [on_device(loader, b, objective, device) for b in islice(loader, found // size)]


def open_tokenizer(job: TrainingJob, context: TrainContext) -> TextTokenizer:
    """Return the tokenizer of MED and Q-Former; one made of the corpus is made once for all.

    Raises UserError. Every rank has to call it.
    """
    if job.config.tokenizer != CORPUS_TOKENIZER:
        name = job.config.tokenizer
        return load_tokenizer(name, job.config.revisions.get(name))
    store = job.open_store()
    if context.is_main and store.read(VOCABULARY) is None:
        words = vocabulary_of_words(_captions(job), job.config.vocabulary_size)
        store.make_folder("train")
        store.create(VOCABULARY, canonical_json(words).encode())
    context.wait_for_all()
    return tokenizer_from_vocabulary(store.read(VOCABULARY) or b"")


def _captions(job: TrainingJob) -> Iterable[str]:
    """Return the captions of the corpus, those of the web as it came where it has raw shards."""
    corpus = job.open_corpus()
    stage = "raw" if corpus.sources("raw") else "clean"

    def every() -> Iterator[str]:
        for record in corpus.shards(stage):
            with corpus.open(record, "parquet") as stream:
                name = "caption" if stage == "raw" else "captions"
                column = pq.read_table(stream, columns=[name])[name].combine_chunks()
            texts = column if stage == "raw" else column.flatten().field("text")
            yield from (text for text in texts.to_pylist() if text)

    return islice(every(), _MAX_CAPTIONS)
