"""Trains the demo's language model: a tiny OPT that says in a sentence what it was told in words.

A stand-in for the OPT and FlanT5 that BLIP-2 freezes. One that had only ever continued captions
could not be steered by what stands before them; so it learns to: a list of what a scene holds, then
BOS, then a caption of it. In stage 2 the Q-Former's output takes the list's place. It reads text
alone, of scenes that are in no list of the demo's web.

    python -m jobs.demo.verbaliser FOLDER
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from jobs.demo.captions import full_caption
from jobs.demo.noise import vocabulary
from jobs.demo.plan import NUM_SPLIT_SCENES
from jobs.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    sample_scene,
)
from jobs.progress import stage_meter
from model.losses import IGNORED
from model.presets import BLIP2_PRESETS

_FIRST_SCENE = NUM_SPLIT_SCENES + 1_000_000  # the image encoder's are before
_SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_STOP = "\n"  # ends a caption, as BLIP-2 has it with OPT


@dataclass(frozen=True, slots=True, kw_only=True)
class VerbaliserTraining:
    """How the language model is trained."""

    num_steps: int = 4000
    batch_size: int = 32
    peak_rate: float = 2e-3
    seed: int = 0


def train_verbaliser(
    config: VerbaliserTraining,
) -> tuple[Any, PreTrainedTokenizerFast, float]:
    """Return the OPTForCausalLM, its tokenizer and its last loss on captions, in nats a token."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    sizes: dict[str, Any] = BLIP2_PRESETS["demo"].llm.config.to_dict() | {
        "vocab_size": len(tokenizer) + 1,  # transformers' Blip2 marks an image by an id of its own
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(_STOP),
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: Any = OPTForCausalLM(OPTConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.peak_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.peak_rate, total_steps=config.num_steps, pct_start=0.05
    )
    batches = _batches(tokenizer, config)
    with stage_meter("language model", config.num_steps, unit="steps", stream=sys.stderr) as meter:
        for _ in range(config.num_steps):
            token_ids, targets = next(batches)
            is_real = token_ids != tokenizer.pad_token_id
            logits = model(input_ids=token_ids, attention_mask=is_real).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            meter.advance(1, 1)
    return model.eval(), tokenizer, float(loss.detach())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: those of the demo's captions and of what lists scenes."""
    listed = (SHAPES, COLOURS, TEXTURES, SIZES, BACKGROUNDS, RELATIONS)
    words = [*_SPECIAL.values(), _STOP, *vocabulary(), *chain.from_iterable(listed)]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_STOP, "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    make: Any = PreTrainedTokenizerFast  # transformers has no types for it
    made: PreTrainedTokenizerFast = make(tokenizer_object=plain, **_SPECIAL)
    return made


def _batches(
    tokenizer: PreTrainedTokenizerFast, config: VerbaliserTraining
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and targets (B, T): the list, BOS, the caption, of which only this counts."""
    rng = np.random.default_rng(config.seed)
    scene = _FIRST_SCENE
    while True:
        rows = []
        for _ in range(config.batch_size):
            drawn = sample_scene(config.seed, scene)
            told: list[int] = tokenizer.encode(_listed(drawn, rng))
            said: list[int] = tokenizer.encode(full_caption(drawn, rng) + _STOP)
            rows.append((told, [tokenizer.bos_token_id, *said]))
            scene += 1
        longest = max(len(told) + len(said) for told, said in rows)
        token_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        targets = torch.full((len(rows), longest), IGNORED)
        for row, (told, said) in enumerate(rows):
            token_ids[row, : len(told) + len(said)] = torch.tensor(told + said)
            targets[row, len(told) + 1 : len(told) + len(said)] = torch.tensor(said[1:])
        yield token_ids, targets


def _listed(scene: Scene, rng: np.random.Generator) -> str:
    """List what a scene holds, its objects in any order, each where it is."""
    said = [scene.background]
    for number in rng.permutation(len(scene.objects)):
        each = scene.objects[number]
        said += [each.size, each.texture, each.colour, each.shape]
        if len(scene.objects) > 1:
            said.append(scene.relation(number, 1 - number) or "and")
    return " ".join(said)


def main() -> None:
    """Train the language model and write model and tokenizer; takes minutes on one core."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    model, tokenizer, loss = train_verbaliser(VerbaliserTraining())
    folder = Path(sys.argv[1])
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sys.stdout.write(f"loss on captions: {loss:.3f}\n")


if __name__ == "__main__":
    main()
