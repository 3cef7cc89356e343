"""Images per core and second: our loader against webdataset with Pillow's transforms.

    python tests/benchmarks/bench_loader.py [--images 384] [--size 224] [--rounds 7]

Both sides read the same shards of photo-like JPEGs, 384 px on the shorter side, and give batches of
float32 tensors after a random resized crop (0.5 to 1 of the area, antialiased bicubic), a flip and
CLIP's normalisation. Each runs on one thread and is timed in CPU seconds, so other work on the
machine disturbs it less; rounds alternate between the sides, and medians are compared. `bare` is
decoding and cropping the same bytes in a loop, from memory and nothing else: what no loader can
beat. `worker` is our loader with one worker process, whose CPU seconds and the main process's count
alike. The last line is JSON.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
import torch
import webdataset
from PIL import Image

from pipeline.corpus import Corpus
from pipeline.image_decode import decode
from pipeline.image_header import read_header
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.loader import Loader, LoaderConfig
from pipeline.loading.draws import draw
from pipeline.loading.images import NUM_DRAWS, random_crop, resize
from pipeline.tar import TarWriter

NUM_SHARDS, BATCH = 3, 32
WIDTH, HEIGHT, QUALITY = 512, 384, 95
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
CAPTION = pa.struct([(name, pa.string()) for name in ("text", "origin", "verdict")])
FIELDS = (
    pa.field("sha256", pa.string()),
    pa.field("captions", pa.list_(CAPTION)),
    pa.field("image_offset", pa.int64()),
    pa.field("image_bytes", pa.int64()),
)

Batches = Iterator[object]


def photo(number: int) -> bytes:
    """Return a JPEG with the spectrum of a photo: strong shapes, weak texture, some noise."""
    rng = np.random.default_rng(number)
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, strength in ((4, 60), (16, 40), (64, 18), (200, 6)):
        coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        pixels += strength * cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    pixels += 2 * rng.normal(size=pixels.shape).astype(np.float32)
    image = pixels.clip(0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(image, quality=QUALITY, colorsubsampling="420")


def write_shards(root: str, num_images: int) -> Corpus:
    """Commit clean shards of that many photos in all."""
    corpus, per_shard = Corpus(root), math.ceil(num_images / NUM_SHARDS)
    for index in range(NUM_SHARDS):
        with corpus.writer("clean", "photos", index, fingerprint="bench") as writer:
            with (
                open(writer.path("tar"), "wb") as stream,
                TarWriter(stream) as tar,
                LedgerWriter(writer.path("parquet"), ledger_schema(FIELDS)) as ledger,
            ):
                for row in range(per_shard):
                    write_sample(tar, ledger, f"{index:05d}{row:04d}", index * per_shard + row)
            writer.commit(rows_in=ledger.num_rows, counts=ledger.counts)
    return corpus


def write_sample(tar: TarWriter, ledger: LedgerWriter, key: str, number: int) -> None:
    """Write one photo with two captions to tar and ledger."""
    texts = [f"a photo of thing {number}", f"thing {number} on a table"]
    members = {"jpg": photo(number), "txt": texts[0].encode(), "json": b"{}"}
    span = tar.write(key, members)["jpg"]
    captions = [{"text": text, "origin": "web", "verdict": "kept"} for text in texts]
    base = {"key": key, "source": "photos", "url": "", "verdict": "kept", "reason": ""}
    place = {"image_offset": span.offset, "image_bytes": span.size}
    ledger.write(base | place | {"captions": captions, "sha256": f"{number:064x}"})


# The sides: each gives its batches without end


def ours(corpus: Corpus, size: int, num_workers: int) -> Loader:
    """Return our loader."""
    config = LoaderConfig(global_batch_size=BATCH, image_size=size, num_workers=num_workers)
    return Loader(corpus, config)


def normalised(loader: Loader) -> Batches:
    """Yield our loader's batches as the model wants them."""
    for batch in loader:
        yield loader.normalise(batch.pixels)


def peer(corpus: Corpus, size: int) -> Batches:
    """Yield batches as one writes it with webdataset and Pillow."""
    tars = sorted(str(path) for path in Path(corpus.root).glob("clean/photos/*.tar"))
    transform = PillowTransform(size)
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=NUM_SHARDS, seed=0)
        .repeat()
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, str.lower)
        .batched(BATCH, collation_fn=stack)
    )
    yield from dataset


def stack(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    """Return the samples as one batch."""
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), list(texts)


class PillowTransform:
    """Torchvision's random resized crop, flip, tensor and normalisation, for Pillow images."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._random = random.Random(0)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        draws = np.array([self._random.random() for _ in range(NUM_DRAWS)])
        crop = random_crop(image.width, image.height, 0.5, draws)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        image = image.crop(box).resize((self._size, self._size), Image.Resampling.BICUBIC)
        if self._random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(MEAN).div_(STD)


def bare(corpus: Corpus, size: int) -> Batches:
    """Yield as many decoded crops as a batch has, and do nothing else; what to crop was drawn."""
    images = []
    for shard in corpus.shards("clean"):
        with corpus.open(shard, "tar") as stream:
            archive = webdataset.tariterators.tar_file_iterator(io.BytesIO(stream.read()))
            images += [member["data"] for member in archive if member["fname"].endswith(".jpg")]
    crops = [random_crop(WIDTH, HEIGHT, 0.5, draw(NUM_DRAWS, n)) for n in range(len(images))]
    number = 0
    while True:
        for _ in range(BATCH):
            data, crop = images[number % len(images)], crops[number % len(images)]
            header = read_header(data)
            pixels = decode(data, header, min_width=WIDTH, min_height=HEIGHT).pixels
            rows = slice(crop.top, crop.top + crop.height)
            resize(pixels[rows, crop.left : crop.left + crop.width], size)
            number += 1
        yield None


# Timing


@dataclass
class Side:
    """One way to make batches, and what its worker process had used of the CPU at last."""

    batches: Batches
    worker: int | None = None
    used: float = 0.0
    rates: list[float] = field(default_factory=list)

    def run(self, num_images: int) -> None:
        """Time the next batches, and note images per CPU second.

        A worker goes on making the next few batches when a round is over. They belong to the round
        that takes them, so its CPU seconds count from the end of its last round.
        """
        num_batches = math.ceil(num_images / BATCH)
        start = time.process_time()
        for _ in range(num_batches):
            next(self.batches)
        seconds = time.process_time() - start
        if self.worker is not None:
            before, self.used = self.used, seconds_of(self.worker)
            seconds += self.used - before
        self.rates.append(num_batches * BATCH / seconds)


def seconds_of(pid: int) -> float:
    """Return what another process has used of the CPU so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def measure(corpus: Corpus, args: argparse.Namespace) -> dict[str, float]:
    """Return each side's median rate over alternating rounds; the worker's are after the others.

    It goes on making batches when its round is over, beside whoever comes next.
    """
    with ours(corpus, args.size, 0) as inline:
        sides = {
            "ours": Side(normalised(inline)),
            "peer": Side(peer(corpus, args.size)),
            "bare": Side(bare(corpus, args.size)),
        }
        for side in sides.values():
            side.run(args.images)  # opens files, finds its memory
            side.rates.clear()
        for _ in range(args.rounds):
            for side in sides.values():
                side.run(args.images)
    with ours(corpus, args.size, 1) as served:
        worker = sides["worker"] = Side(normalised(served))
        next(worker.batches)  # starts the process
        worker.worker = multiprocessing.active_children()[0].pid
        for _ in range(args.rounds + 1):
            worker.run(args.images)
        del worker.rates[0]  # its lead is the same at the end of this and of each round
    return {name: statistics.median(side.rates) for name, side in sides.items()}


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=384, help="of each side in each round")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    """Compare and print a table; the last line is JSON."""
    args = parse()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory(prefix="bench-loader.") as root:
        rates = measure(write_shards(root, args.images), args)
    print(f"{WIDTH} x {HEIGHT} JPEGs to {args.size} px, images per CPU second, median of rounds")
    for side, value in rates.items():
        print(f"{side:8}{value:10.1f}{value / rates['peer']:8.2f} x peer")
    ratio, of_bare = rates["ours"] / rates["peer"], rates["ours"] / rates["bare"]
    line = {side: round(value, 1) for side, value in rates.items()}
    line |= {"ratio": round(ratio, 3), "share_of_bare": round(of_bare, 3)}
    print(json.dumps({"name": "loader", **line, "unit": "images/s/core"}))


if __name__ == "__main__":
    main()
