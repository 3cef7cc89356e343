"""Images a second from raw tar to captions sidecar, against a loop of transformers' classes.

    python tests/benchmarks/bench_score.py [--images 24] [--captions 1] [--repeats 3]

Both sides have the same random weights at BLIP-base sizes, 384 pixels: a captioner and a filter.
They start from the same raw shard of 256-pixel JPEGs and end with a Parquet file of n synthetic
captions and n + 1 ITM probabilities an image. The peer is what one writes first: for each sample
PIL, `BlipImageProcessorPil`, `generate(num_return_sequences=n)`, then the retrieval class on every
pair. ITM of the web captions has to be equal on both sides, or nothing is reported. Rounds
alternate between the sides, and medians are compared.

Random weights hardly ever end a caption, so each runs to its 20 tokens. The shares are of our wall
time; encode is the two image encoders', generate and score what their models do besides. With CUDA
both sides run in bfloat16, and ITM is compared more loosely. Processor seconds are told besides:
on a machine that others use too, they are the steadier measure.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_captions import LENGTHS, PROMPT, blip_config, randomise
from PIL import Image
from torch import nn
from transformers import (
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
)
from transformers.utils.logging import disable_progress_bar

from model.checkpoints import load_captioner, load_filter
from pipeline.captioner import Captioner
from pipeline.corpus import Corpus
from pipeline.download_row import RAW_SCHEMA
from pipeline.ledger import LedgerWriter
from pipeline.model_configs import CaptionerConfig, ModelConfig, ScorerConfig
from pipeline.models import ImagePreprocessor
from pipeline.record import ShardRecord
from pipeline.sample import Caption, Origin, Sample
from pipeline.score import ShardScorer
from pipeline.score_config import ScoreConfig
from pipeline.score_outcome import ScoreOutcome
from pipeline.scorer import ItmFilter, Scorer
from pipeline.tar import TarWriter, read_samples

SOURCE, SIDE, SIZE, MAX_TOKENS = "photos", 256, 384, 35
WORDS = {1037: "a", 3861: "picture", 1997: "of"}
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}


class EncoderClock:
    """Adds up the seconds that image encoders take."""

    def __init__(self, *encoders: nn.Module) -> None:
        self.seconds = 0.0
        self._started_at = 0.0
        for encoder in encoders:
            encoder.register_forward_pre_hook(self._start)
            encoder.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        synchronise()
        self._started_at = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self._started_at


@dataclass(frozen=True)
class Sides:
    """Both sides' models, with the same weights."""

    captioner: Captioner
    scorer: Scorer
    clocks: dict[str, EncoderClock]
    peer_captioner: Any
    peer_filter: Any
    tokenizer: BertTokenizer
    device: torch.device
    dtype: torch.dtype
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "peer": []})


def synchronise() -> None:
    """Wait for the device, where there is one to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_tokenizer(folder: str) -> BertTokenizer:
    """Return a tokenizer of BERT's size with its special tokens in their places."""
    words = {**WORDS, **SPECIAL}
    path = Path(folder, "vocab.txt")
    path.write_text("\n".join(words.get(number, f"w{number}") for number in range(30522)))
    return BertTokenizer(str(path))


def build(folder: str, args: argparse.Namespace) -> Sides:
    """Return both sides; ours is read from what transformers wrote."""
    torch.manual_seed(0)
    config = blip_config()
    peers: list[Any] = [BlipForConditionalGeneration(config), BlipForImageTextRetrieval(config)]
    for name, peer in zip(("captioner", "filter"), peers, strict=True):
        randomise(peer)
        peer.save_pretrained(f"{folder}/{name}")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    captioner = load_captioner(Path(folder, "captioner")).to(device, dtype)
    itm_filter = load_filter(Path(folder, "filter")).to(device, dtype)
    tokenizer, preprocessor = make_tokenizer(folder), ImagePreprocessor(SIZE)
    named = ModelConfig(name="random")
    scoring = ScorerConfig(
        filter=named, clip=None, keeps_cls=True, has_itc=False, is_text_cleaned=False
    )
    return Sides(
        captioner=Captioner(
            captioner,
            tokenizer,
            preprocessor,
            CaptionerConfig(name="random", num_captions=args.captions, **LENGTHS),
            seed=0,
        ),
        scorer=Scorer(
            scoring, filter=ItmFilter(itm_filter, tokenizer, preprocessor, scoring), clip=None
        ),
        clocks={
            "captioner": EncoderClock(captioner.image_encoder),
            "filter": EncoderClock(itm_filter.image_encoder),
        },
        peer_captioner=peers[0].to(device, dtype).eval(),
        peer_filter=peers[1].to(device, dtype).eval(),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )


def photo(number: int) -> bytes:
    """Return a JPEG that compresses like a photo."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((SIDE * 4 // 3, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def commit_raw(corpus: Corpus, num_images: int) -> ShardRecord:
    """Commit a raw shard whose web captions have 8 to 20 words."""
    rng = np.random.default_rng(0)
    with corpus.writer("raw", SOURCE, 0, fingerprint="bench") as writer:
        with (
            open(writer.path("tar"), "wb") as stream,
            TarWriter(stream) as tar,
            LedgerWriter(writer.path("parquet"), RAW_SCHEMA) as ledger,
        ):
            for number in range(num_images):
                key = f"{number:09d}"
                words = rng.integers(2000, 30000, rng.integers(8, 21))
                text = " ".join(f"w{word}" for word in words if word not in WORDS)
                caption = Caption(text=text, origin=Origin.WEB)
                tar.write(
                    key, Sample(key=key, image=photo(number), captions=(caption,)).to_members()
                )
                row = {"key": key, "source": SOURCE, "verdict": "kept", "reason": ""}
                ledger.write(dict.fromkeys(RAW_SCHEMA.names) | row | {"origin": "web"})
        return writer.commit(rows_in=ledger.num_rows, counts=ledger.counts)


def run_ours(sides: Sides, root: str, num_images: int) -> tuple[list[dict[str, Any]], ScoreOutcome]:
    """Score a fresh corpus; return the sidecar's rows and where the time went."""
    corpus = Corpus(root)
    raw = commit_raw(corpus, num_images)
    config = ScoreConfig(dtype=str(sides.dtype).removeprefix("torch."))
    for clock in sides.clocks.values():
        clock.seconds = 0.0
    scorer = ShardScorer(corpus, sides.captioner, sides.scorer, config, seed=0)
    begun_at = time.process_time()
    done = scorer.score(raw)
    sides.cpu_seconds["ours"].append(time.process_time() - begun_at)
    with corpus.open(done.record, "parquet") as stream:
        return pq.read_table(stream).to_pylist(), done.outcome


@torch.inference_mode()
def run_peer(sides: Sides, root: str, num_images: int) -> tuple[list[dict[str, Any]], float]:
    """Do the same one sample after another; return the rows and the seconds."""
    corpus = Corpus(root)
    raw = commit_raw(corpus, num_images)
    processor = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    started_at, begun_at = time.perf_counter(), time.process_time()
    rows: list[dict[str, Any]] = []
    with corpus.open(raw, "tar") as stream:
        for found in read_samples(stream, shard=raw.name, on_fault=print):
            sample = Sample.from_members(found.key, found.members)
            image = Image.open(io.BytesIO(sample.image)).convert("RGB")
            pixels = processor(image, return_tensors="pt").pixel_values
            pixels = pixels.to(sides.device, sides.dtype)
            texts = [sample.captions[0].text, *peer_captions(sides, pixels)]
            rows += [
                {"key": sample.key, "text": text, "itm": peer_match(sides, pixels, text)}
                for text in texts
            ]
    pq.write_table(pa.Table.from_pylist(rows), f"{root}/peer.parquet", compression="zstd")
    sides.cpu_seconds["peer"].append(time.process_time() - begun_at)
    return rows, time.perf_counter() - started_at


def peer_captions(sides: Sides, pixels: torch.Tensor) -> list[str]:
    """Return n sampled captions of one image."""
    ids = torch.tensor([[*PROMPT, 102]], device=sides.device)
    generated = sides.peer_captioner.generate(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_p=0.9,
        top_k=0,
        num_return_sequences=sides.captioner.config.num_captions,
        **LENGTHS,
    )
    texts = sides.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.removeprefix("a picture of").strip() for text in texts]


def peer_match(sides: Sides, pixels: torch.Tensor, text: str) -> float:
    """Return P(match) of one pair."""
    inputs = sides.tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    logits = sides.peer_filter(
        pixel_values=pixels,
        input_ids=inputs.input_ids.to(sides.device),
        attention_mask=inputs.attention_mask.to(sides.device),
    ).itm_score
    return float(logits.float().softmax(dim=1)[0, 1])


def check_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], atol: float) -> None:
    """Stop unless both have as many rows and the web captions' ITM are equal."""
    per_image = len(ours) // len({row["key"] for row in ours})
    pairs = list(zip(ours, theirs, strict=True))[::per_image]
    off = max(abs(own["itm"] - other["itm"]) for own, other in pairs)
    if any(own["text"] != other["text"] for own, other in pairs) or off > atol:
        raise SystemExit(f"ITM of web captions differs by {off:.1e}: nothing is reported")


def shares_of(outcome: ScoreOutcome, clocks: dict[str, EncoderClock]) -> dict[str, float]:
    """Return the share of wall time of each kind of work; read and decode overlap the rest."""
    wall, times = outcome.elapsed_seconds, outcome.times
    encode = {name: clock.seconds for name, clock in clocks.items()}
    seconds = {
        "read": times.read,
        "decode": times.decode,
        "wait": times.wait,
        "encode": sum(encode.values()),
        "generate": times.caption - encode["captioner"],
        "score": times.score - encode["filter"],
        "write": times.write,
    }
    return {name: each / wall for name, each in seconds.items()}


def measure(
    sides: Sides, args: argparse.Namespace, folder: str
) -> tuple[float, float, dict[str, float]]:
    """Return the median seconds of either side, and the shares of our median round."""
    rounds: list[tuple[float, dict[str, float]]] = []
    theirs: list[float] = []
    for number in range(args.repeats + 1):
        is_warm_up = number == 0
        num_images = 2 if is_warm_up else args.images
        rows, outcome = run_ours(sides, f"{folder}/ours{number}", num_images)
        shares = shares_of(outcome, sides.clocks)
        peer_rows, seconds = run_peer(sides, f"{folder}/peer{number}", num_images)
        check_equal(rows, peer_rows, 1e-4 if sides.dtype == torch.float32 else 0.03)
        if not is_warm_up:
            rounds.append((outcome.elapsed_seconds, shares))
            theirs.append(seconds)
    rounds.sort(key=lambda each: each[0])
    own_seconds, shares = rounds[len(rounds) // 2]
    return own_seconds, statistics.median(theirs), shares


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--images", type=int, default=1024 if has_cuda else 24)
    parser.add_argument("--captions", type=int, default=1, help="synthetic ones an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Compare and print a table; the last line is JSON."""
    args = parse()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        sides = build(folder, args)
        ours, peer, shares = measure(sides, args, folder)
    print(f"raw tar to sidecar, BLIP base, {SIZE} px, {args.images} images, {args.captions} "
          f"captions each, {args.device}, {sides.dtype}, {args.threads} threads")  # fmt: skip
    speed = {"ours": args.images / ours, "peer": args.images / peer}
    for side, each in speed.items():
        cpu = statistics.median(sides.cpu_seconds[side][1:]) / args.images
        print(f"{side:6}{each:10.3f} images/s, {cpu:.2f} processor seconds an image")
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(
        json.dumps(
            {
                "name": "score_shard",
                **{side: round(each, 3) for side, each in speed.items()},
                "ratio": round(peer / ours, 3),
                "unit": "images/s",
                "shares": {name: round(share, 3) for name, share in shares.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
