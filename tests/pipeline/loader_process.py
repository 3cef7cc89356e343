"""A process that reads batches and notes them, to be killed: loader_process.py ROOT OUT STEPS ...

Reads as every rank of a world in turn. After each step it appends a line of what was seen to
OUT/log, then saves the position to OUT/state, as a training loop saves a checkpoint.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

from pipeline.corpus import Corpus
from pipeline.loader import Loader, LoaderConfig

CONFIG = LoaderConfig(
    global_batch_size=4, image_size=16, augmentation="crop_randaugment", group_shards=2, seed=11
)


def seen_in(batch):
    """Return what identifies each sample of a batch, to the last bit of its pixels."""
    rows = zip(batch.keys, batch.texts, batch.image_ids.tolist(), batch.pixels, strict=True)
    return [
        [key, text, image_id, hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()]
        for key, text, image_id, pixels in rows
    ]


def read_step(loaders, micro_batches=1):
    """Return what all ranks see in the next step, in the order of the global batch."""
    batches = [next(loader) for loader in loaders for _ in range(micro_batches)]
    assert len({batch.step for batch in batches}) == 1
    return [row for batch in batches for row in seen_in(batch)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    config = CONFIG.model_copy(update={"num_workers": options.workers})
    corpus, state = Corpus(options.root), options.out / "state"
    loaders = [
        Loader(corpus, config, rank=rank, world_size=options.world) for rank in range(options.world)
    ]
    if state.exists():
        for loader in loaders:
            loader.load_state_dict(json.loads(state.read_text()))
    with (options.out / "log").open("a") as log:
        while loaders[0].step < options.steps:
            step = loaders[0].step
            log.write(json.dumps([step, read_step(loaders)]) + "\n")
            log.flush()
            state.with_suffix(".new").write_text(json.dumps(loaders[0].state_dict()))
            os.replace(state.with_suffix(".new"), state)
    for loader in loaders:
        loader.close()


if __name__ == "__main__":
    main()
