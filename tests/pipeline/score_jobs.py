"""Raw shards of every kind of row, tiny models, and the job that scores them.

Shared by tests and by the processes they kill. As a program it runs the job in forked children,
for a new Python with torch starts too slowly: each line on stdin is `ROOT BATCH_SIZE`; it answers
with a line when the child has begun, its process id, and one when it has ended, its wait status.
"""

import io
import os
import struct
import sys
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizerFast, CLIPConfig, CLIPModel

from model.presets import MED_PRESETS
from pipeline.captioner import Captioner
from pipeline.clip_scorer import ClipScorer
from pipeline.corpus import Corpus
from pipeline.download_row import RAW_SCHEMA
from pipeline.ledger import LedgerWriter
from pipeline.model_configs import CaptionerConfig, ModelConfig, ScorerConfig
from pipeline.models import ImagePreprocessor
from pipeline.sample import Caption, Origin, Sample
from pipeline.score import ShardScorer
from pipeline.score_config import ScoreConfig
from pipeline.scorer import ItmFilter, Scorer
from pipeline.tar import TarWriter

SOURCE = "web"
SEED = 7
WORDS = ("a", "picture", "of", "red", "blue", "cat", "dog", "on", "under", "grass", "table", "sky")
WORD_IDS = 128  # of the tiny models; [DEC] and [ENC] come behind


@dataclass(frozen=True)
class Row:
    """One row of a raw shard: what is in its tar, or why nothing is."""

    kind: str = "web"
    number: int = 0


@cache
def picture(number, kind="JPEG", size=(40, 30)):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def words(number, length=6):
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, length))


def sample_of(key, number, **changes):
    fields = {
        "key": key,
        "image": picture(number),
        "captions": (Caption(text=words(number), origin=Origin.WEB),),
        "metadata": {"key": key, "url": f"http://host/{number}"},
    }
    return Sample(**(fields | changes))


def captions(texts, origin=Origin.WEB):
    return tuple(Caption(text=text, origin=origin, index=index) for index, text in enumerate(texts))


def resized_header(png, side):
    """Return the PNG with a header that claims side x side pixels."""
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def members_of(key, row):
    """Return the files of a kept row, sound or not as its kind says."""
    number, data = row.number, picture(row.number)
    spoilt = {
        "truncated": data[:-40],
        "no_image": b"<html>not here</html>",
        "huge": resized_header(picture(number, "PNG"), 60_000),
        "line": picture(number, "PNG", (1500, 1)),
    }
    texts = {
        "turned": captions([words(number, 3), words(number + 1, 12)])[::-1],
        "empty_caption": captions([" \t"]),
        "no_caption": (),
        "two_captions": captions([words(number, 3), words(number + 1, 12)]),
        "long_caption": captions(["word " * 5000]),
        "human": captions([words(number), words(number + 1), ""], Origin.HUMAN),
        "human_without": (),
    }
    sample = sample_of(
        key,
        number,
        image=picture(number, "PNG") if row.kind == "png" else spoilt.get(row.kind, data),
        captions=texts.get(row.kind, captions([words(number)])),
    )
    members = sample.to_members()
    if row.kind == "bad_json":
        members["json"] = b"{" + members["json"]
    if row.kind == "not_utf8":
        members = {"jpg": members["jpg"], "txt": b"\xff\xfe"}
    if row.kind == "two_images":
        members["png"] = members["jpg"]
    return members


LOST = {"failed": "http_404", "dropped": "image_too_small"}  # rows without files
HUMAN = ("human", "human_without")
KINDS = (
    "web", "png", "two_captions", "turned", "empty_caption", "no_caption", "long_caption", "human",
    "human_without", "truncated", "no_image", "huge", "line", "bad_json", "not_utf8", "two_images",
    *LOST,
)  # fmt: skip


def key_of(index, position):
    return f"{index:05d}{position:04d}"


def commit_raw(corpus, rows, index=0, source=SOURCE, replace=None):
    """Commit a raw shard of these rows, as a download would."""
    with corpus.writer("raw", source, index, fingerprint="raw", replace=replace) as writer:
        with (
            open(writer.path("tar"), "wb") as stream,
            TarWriter(stream) as tar,
            LedgerWriter(writer.path("parquet"), RAW_SCHEMA) as ledger,
        ):
            for position, row in enumerate(rows):
                key = key_of(index, position)
                ledger.write(
                    dict.fromkeys(RAW_SCHEMA.names)
                    | {
                        "key": key,
                        "source": source,
                        "url": f"http://host/{row.number}",
                        "verdict": row.kind if row.kind in LOST else "kept",
                        "reason": LOST.get(row.kind, ""),
                        "origin": "human" if row.kind in HUMAN else "web",
                    }
                )
                if row.kind not in LOST:
                    tar.write(key, members_of(key, row))
        return writer.commit(rows_in=ledger.num_rows, counts=ledger.counts)


def tokenizer(folder):
    """Return a tokenizer of as many words as the tiny models know."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [f"w{number}" for number in range(WORD_IDS - len(special) - len(WORDS))]
    path = os.path.join(folder, "vocab.txt")
    with open(path, "w") as stream:
        stream.write("\n".join([*special, *WORDS, *letters]))
    return BertTokenizerFast(path)


def make_captioner(folder, **changes):
    """Return a tiny captioner with random weights, the same for every call."""
    torch.manual_seed(0)
    model = MED_PRESETS["tiny"].captioner()
    size = model.image_encoder.config.image_size
    config = CaptionerConfig(**({"name": "tiny", "max_length": 10} | changes))
    return Captioner(
        model,
        tokenizer(folder),
        ImagePreprocessor(size),
        config,
        seed=SEED,
        fingerprint="captioner-weights",
    )


def make_scorer(folder, *, with_clip=True):
    """Return a tiny filter and a tiny CLIP with random weights, the same for every call."""
    torch.manual_seed(1)
    words = tokenizer(folder)
    model = MED_PRESETS["tiny"].filter()
    size = model.image_encoder.config.image_size
    tiny = ModelConfig(name="tiny")
    config = ScorerConfig(filter=tiny, clip=tiny if with_clip else None)
    itm_filter = ItmFilter(
        model, words, ImagePreprocessor(size), config, fingerprint="filter-weights"
    )
    return Scorer(config, filter=itm_filter, clip=make_clip(words) if with_clip else None)


def make_clip(words):
    text = {
        "vocab_size": WORD_IDS, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    preprocessor = ImagePreprocessor(32, is_middle_cut=True)
    return ClipScorer(CLIPModel(config), words, preprocessor, fingerprint="clip-weights")


@cache
def rows_of_shard(index, num_rows=24):
    """Return rows of every kind, most of them sound, others from shard to shard."""
    rng = np.random.default_rng(index)
    return tuple(
        Row(KINDS[rng.integers(len(KINDS))] if rng.random() < 0.5 else "web", int(number))
        for number in rng.integers(0, 1000, num_rows)
    )


def make_shard_scorer(corpus, folder, config=None, **changes):
    captioner, scorer = make_captioner(folder), make_scorer(folder)
    config = config or ScoreConfig(batch_size=8)
    return ShardScorer(corpus, captioner, scorer, config, seed=SEED, **changes)


def score_all(corpus, shard_scorer):
    corpus.sweep()
    done = [shard_scorer.score(record) for record in corpus.shards("raw")]
    corpus.sweep()
    return done


def tree(root):
    """Return every file below the root with its bytes."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as stream:
                found[os.path.relpath(path, root)] = stream.read()
    return found


def say(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def run_job(root, batch_size, models):
    corpus = Corpus(root)
    config = ScoreConfig(batch_size=batch_size)
    score_all(corpus, ShardScorer(corpus, *models, config, seed=SEED))


def serve(folder):
    """Run jobs in forked children; the models are made once, nothing is computed here."""
    torch.set_num_threads(1)
    models = make_captioner(folder), make_scorer(folder)
    say("ready")
    for line in sys.stdin:
        root, batch_size = line.split()
        child = os.fork()
        if not child:
            try:
                run_job(root, int(batch_size), models)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        say(child)
        say(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve(sys.argv[1])
