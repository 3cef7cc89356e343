"""Image-text pairs a second: our ITM filter against transformers' BlipForImageTextRetrieval.

    python tests/benchmarks/bench_pairs.py [--images 2] [--captions 1 11] [--repeats 3]

Both sides have the same random weights at BLIP-base sizes, 384 pixels, and captions of 8 to 20
tokens; probabilities are compared first. Two peers: `pairs` calls the class on every pair, as its
documentation shows; `once` is what one writes with its parts to run its image encoder once for an
image. Rounds alternate between the sides, and medians are compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from model.capfilt import MedFilter
from model.names.blip import FILTER_TRANSFORMERS, med_to_ours
from model.transformers_configs import blip_to_ours
from model.weight_files import load_strictly
from pipeline.model_configs import ScorerConfig
from pipeline.models import ImagePreprocessor
from pipeline.scorer import ItmFilter

START, END = 101, 102


class Words:
    """A tokenizer of texts that are numbers: each word is a token's id."""

    pad_token_id = 0

    def __call__(
        self, texts: Sequence[str], truncation: bool = True, max_length: int = 35
    ) -> dict[str, list[list[int]]]:
        """Return the ids of texts between [CLS] and [SEP]."""
        return {"input_ids": [[START, *map(int, text.split()), END] for text in texts]}


def blip_config() -> BlipConfig:
    """Return BLIP's base sizes, where transformers' defaults are others."""
    heads = {"num_attention_heads": 12}
    return BlipConfig(
        text_config=heads | {"encoder_hidden_size": 768},
        vision_config=heads | {"image_size": 384, "layer_norm_eps": 1e-6},
    )


def build() -> tuple[ItmFilter, BlipForImageTextRetrieval]:
    """Return both sides with the same weights, N(0, 0.02)."""
    peer: Any = BlipForImageTextRetrieval(blip_config()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + noise if is_scale else noise)
    vision, med, joint_width = blip_to_ours(peer.config)
    ours = MedFilter(vision, med, joint_width=joint_width)
    load_strictly(ours, med_to_ours(peer.state_dict(), FILTER_TRANSFORMERS))
    config = ScorerConfig(clip=None, keeps_cls=True, has_itc=False)
    words: Any = Words()
    return ItmFilter(ours, words, ImagePreprocessor(384), config), peer


def make_texts(num_images: int, num_captions: int) -> list[list[str]]:
    """Return captions of 6 to 18 words, so 8 to 20 tokens."""
    generator = torch.Generator().manual_seed(2)

    def text() -> str:
        number = int(torch.randint(6, 19, (1,), generator=generator))
        return " ".join(map(str, torch.randint(1000, 30000, (number,), generator=generator)
                            .tolist()))  # fmt: skip

    return [[text() for _ in range(num_captions)] for _ in range(num_images)]


def padded(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, (n, T), as a tokenizer pads them."""
    rows = Words()(texts)["input_ids"]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, (ids != 0).long()


Run = Callable[[], list[list[float]]]


def our_run(ours: ItmFilter, pixels: torch.Tensor, texts: list[list[str]]) -> Run:
    """Return our way."""
    return lambda: [[itm or 0.0 for itm, _ in each] for each in ours.matches(pixels, texts)]


def pairs_run(peer: Any, pixels: torch.Tensor, texts: list[list[str]]) -> Run:
    """Return the class called on the pairs of an image at a time."""

    def run() -> list[list[float]]:
        found = []
        with torch.inference_mode():
            for image, each in zip(pixels, texts, strict=True):
                ids, mask = padded(each)
                images = image.expand(len(each), -1, -1, -1)
                output = peer(pixel_values=images, input_ids=ids, attention_mask=mask)
                found.append(output.itm_score.softmax(dim=1)[:, 1].tolist())
        return found

    return run


def once_run(peer: Any, pixels: torch.Tensor, texts: list[list[str]]) -> Run:
    """Return its parts: the image encoder once an image, the text encoder for all its texts."""

    def run() -> list[list[float]]:
        found = []
        with torch.inference_mode():
            for image, each in zip(pixels, texts, strict=True):
                ids, mask = padded(each)
                embeds = peer.vision_model(pixel_values=image[None]).last_hidden_state
                states = peer.text_encoder(
                    input_ids=ids,
                    attention_mask=mask,
                    encoder_hidden_states=embeds.expand(len(each), -1, -1),
                    encoder_attention_mask=torch.ones(len(each), embeds.shape[1]),
                ).last_hidden_state
                found.append(peer.itm_head(states[:, 0]).softmax(dim=1)[:, 1].tolist())
        return found

    return run


def compare(sides: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return each side's median seconds over alternating rounds, after one of warm-up.

    Stops unless all sides find the same probabilities.
    """
    found = {side: torch.tensor(run()) for side, run in sides.items()}
    for values in found.values():
        torch.testing.assert_close(values, found["ours"], atol=1e-4, rtol=0)
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            start = clock()
            run()
            taken[side].append(clock() - start)
    return {side: statistics.median(values) for side, values in taken.items()}


def main() -> None:
    """Compare and print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--captions", type=int, nargs="+", default=[1, 11])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of all threads: on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    ours, peer = build()
    pixels = torch.randn(args.images, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    print(f"BLIP base, 384 px, fp32, {args.images} images, {args.threads} threads")
    print(
        f"{'captions/image':>14}{'ours/s':>10}{'pairs/s':>10}{'ratio':>8}{'once/s':>10}{'ratio':>8}"
    )
    results: dict[str, dict[str, float]] = {"ours": {}, "peer": {}, "ratio": {}}
    for number in args.captions:
        texts = make_texts(args.images, number)
        sides = {
            "ours": our_run(ours, pixels, texts),
            "pairs": pairs_run(peer, pixels, texts),
            "once": once_run(peer, pixels, texts),
        }
        taken = compare(sides, args.repeats, clock)
        speed = {side: args.images * number / each for side, each in taken.items()}
        ratios = {side: taken[side] / taken["ours"] for side in ("pairs", "once")}
        print(
            f"{number:14}{speed['ours']:10.2f}{speed['pairs']:10.2f}{ratios['pairs']:8.2f}"
            f"{speed['once']:10.2f}{ratios['once']:8.2f}",
            flush=True,
        )
        results["ours"][str(number)] = round(speed["ours"], 3)
        for side, ratio in ratios.items():
            results["peer"][f"{number} {side}"] = round(speed[side], 3)
            results["ratio"][f"{number} {side}"] = round(ratio, 3)
    unit = "pairs/CPU-s" if args.cpu_time else "pairs/s"
    print(json.dumps({"name": "itm_pairs", **results, "unit": unit}))


if __name__ == "__main__":
    main()
