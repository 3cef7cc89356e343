"""Captions a second: our captioner against transformers' `generate(num_return_sequences=n)`.

    python tests/benchmarks/bench_captions.py [--images 8] [--captions 1 10] [--repeats 3]

Both sides have the same random weights at BLIP-base sizes, 384 pixels, and sample from the nucleus
with CapFilt's settings; greedy captions are compared first and have to be identical. Rounds
alternate between the sides, and medians are compared. Random weights hardly ever end a caption, so
each runs to its 20 tokens; `--ends` makes the end likely, as trained captioners do, about ten
tokens in.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from model.capfilt import MedCaptioner
from model.captioning import CaptionDecoder
from model.generation import DecodingConfig, NucleusConfig
from model.names.blip import CAPTIONER_TRANSFORMERS, med_to_ours
from model.transformers_configs import blip_to_ours
from model.weight_files import load_strictly

PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
END = 102
LENGTHS = {"min_length": 5, "max_length": 20, "repetition_penalty": 1.1}


def blip_config(width: int = 768, layers: int = 12, vision_layers: int = 12) -> BlipConfig:
    """Return BLIP's base sizes, where transformers' defaults are others."""
    text = {
        "vocab_size": 30524,
        "hidden_size": width,
        "encoder_hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "intermediate_size": 4 * width,
    }
    vision = {
        "hidden_size": width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 12,
        "intermediate_size": 4 * width,
        "image_size": 384,
        "layer_norm_eps": 1e-6,
    }
    return BlipConfig(text_config=text, vision_config=vision)


def randomise(model: torch.nn.Module) -> None:
    """Give every weight N(0, 0.02): transformers starts the image encoder at almost nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + noise if is_scale else noise)


def build(ends: bool) -> tuple[MedCaptioner, BlipForConditionalGeneration]:
    """Return both sides with the same weights."""
    config = blip_config()
    peer: Any = BlipForConditionalGeneration(config).eval()
    randomise(peer)
    if ends:
        with torch.no_grad():
            peer.text_decoder.cls.predictions.bias[END] += 8
    vision, med, _ = blip_to_ours(config)
    ours = MedCaptioner(vision, med).eval()
    load_strictly(ours, med_to_ours(peer.state_dict(), CAPTIONER_TRANSFORMERS))
    return ours, peer


Run = Callable[[], torch.Tensor]


def peer_run(model: Any, pixels: torch.Tensor, num_captions: int, is_sampled: bool) -> Run:
    """Return transformers' way; its other defaults are switched off."""
    ids = torch.tensor([[*PROMPT, END]]).repeat(len(pixels), 1)
    options = {"do_sample": True, "top_p": 0.9, "top_k": 0, "num_return_sequences": num_captions}

    def run() -> torch.Tensor:
        with torch.inference_mode():
            chosen = options if is_sampled else {"do_sample": False}
            return model.generate(
                pixel_values=pixels,
                input_ids=ids.clone(),
                attention_mask=torch.ones_like(ids),
                **LENGTHS,
                **chosen,
            )

    return run


def our_run(model: MedCaptioner, pixels: torch.Tensor, num_captions: int, is_sampled: bool) -> Run:
    """Return our way, as `Captioner` goes it."""
    config = NucleusConfig(**LENGTHS) if is_sampled else DecodingConfig(**LENGTHS)
    decoder = CaptionDecoder(model, config, PROMPT, seed=0, num_captions=num_captions)
    keys = [f"key{number}" for number in range(len(pixels))]
    return lambda: decoder.decode(pixels, keys)


def until_end(ids: torch.Tensor) -> list[list[int]]:
    """Return rows up to their end, behind which the sides pad as they like."""
    rows = ids.tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def compare(sides: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return each side's median seconds over alternating rounds, after one of warm-up."""
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(repeats + 1):
        for side, run in sides.items():
            start = clock()
            run()
            if number:
                taken[side].append(clock() - start)
    return {side: statistics.median(values) for side, values in taken.items()}


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, help="16 for one caption an image, else 8")
    parser.add_argument("--captions", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of all threads: on a busy machine")
    parser.add_argument("--ends", action="store_true", help="captions end, about ten tokens in")
    return parser.parse_args()


def main() -> None:
    """Compare and print a table; the last line is JSON."""
    args = parse()
    torch.set_num_threads(args.threads)
    ours, peer = build(args.ends)
    pixels = torch.randn(16, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    greedy = [
        make(side, pixels[:2], 1, False)() for make, side in ((our_run, ours), (peer_run, peer))
    ]
    if until_end(greedy[0]) != until_end(greedy[1]):
        raise SystemExit("greedy captions differ between the sides: nothing was measured")
    print(f"BLIP base, 384 px, fp32, {args.threads} threads")
    print(f"{'captions/image':>14}{'ours/s':>10}{'peer/s':>10}{'ratio':>8}")
    results = {}
    for number in args.captions:
        images = pixels[: args.images or (16 if number == 1 else 8)]
        sides = {
            "ours": our_run(ours, images, number, True),
            "peer": peer_run(peer, images, number, True),
        }
        clock = time.process_time if args.cpu_time else time.perf_counter
        taken = compare(sides, args.repeats, clock)
        speed = {side: len(images) * number / each for side, each in taken.items()}
        ratio = taken["peer"] / taken["ours"]
        print(f"{number:14}{speed['ours']:10.2f}{speed['peer']:10.2f}{ratio:8.2f}")
        results[str(number)] = {side: round(each, 3) for side, each in speed.items()} | {
            "ratio": round(ratio, 3)
        }
    print(
        json.dumps(
            {
                "name": "captions",
                "ours": {number: each["ours"] for number, each in results.items()},
                "peer": {number: each["peer"] for number, each in results.items()},
                "ratio": {number: each["ratio"] for number, each in results.items()},
                "unit": "captions/CPU-s" if args.cpu_time else "captions/s",
            }
        )
    )


if __name__ == "__main__":
    main()
