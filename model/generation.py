"""Decoding captions token by token: greedy, and nucleus sampling that is seeded for each caption.

A model takes part through `Decoder`: a step that reads tokens and remembers them. Beams stand in
`model.beam_search`. Every option of decoding is in a config; nothing is taken from a library's
defaults.

Dims: B images, R = B * n captions (the n of an image side by side), T tokens of the prompt, L the
longest caption with its prompt, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.capfilt import MedCaptioner
from model.med import DecoderState
from model.qformer import CaptionCache, QFormer

State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class Decoder(Generic[State]):
    """What decoding asks of a model.

    `step` reads the next tokens (R, t) int64 of every caption and returns the (R, V) logits of what
    follows, with a state that holds these tokens too; the old state is used up. `reorder` takes a
    state and an int64 index (R',), and continues row i from what was row `index[i]`; a row stays
    with its image.
    """

    step: Callable[[Tensor, State], tuple[Tensor, State]]
    reorder: Callable[[State, Tensor], State]


def med_decoder(captioner: MedCaptioner) -> Decoder[DecoderState]:
    """Return the decoder of BLIP's captioner; `captioner.begin(pixels, ...)` is its first state.

    Begin with `num_captions` 1, whatever follows, and with room for `max_length` tokens.
    """
    return Decoder(captioner.step, DecoderState.reordered)


def qformer_decoder(qformer: QFormer) -> Decoder[CaptionCache]:
    """Return the decoder of stage 1; `Stage1.begin_caption(pixels)` is its first state."""

    def step(token_ids: Tensor, cache: CaptionCache) -> tuple[Tensor, CaptionCache]:
        states, cache = qformer.decode_step(token_ids, cache)
        return qformer.next_token_logits(states[:, -1]), cache

    return Decoder(step, CaptionCache.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingConfig:
    """Where a caption ends and how long it is; by itself, greedy decoding.

    Lengths are in tokens. The prompt, its first token included, counts among them (as for BLIP,
    Sec. 3.3) unless `counts_prompt` is False.
    """

    end_id: int = 102  # [SEP] of bert-base-uncased
    pad_id: int = 0  # follows the end
    min_length: int = 5  # before it, no caption ends
    max_length: int = 20  # the end included
    counts_prompt: bool = True
    repetition_penalty: float = 1.0  # tokens so far, of the prompt too, lose by this factor

    def __post_init__(self) -> None:
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length is {self.min_length}, max_length {self.max_length}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it is positive")

    def total_lengths(self, prompt_length: int) -> tuple[int, int]:
        """Return the least and the greatest length of prompt and caption together.

        Raises ValueError when the prompt leaves no room for a token.
        """
        extra = 0 if self.counts_prompt else prompt_length
        if self.max_length + extra <= prompt_length:
            raise ValueError(
                f"the prompt has {prompt_length} tokens and max_length is {self.max_length}, "
                f"prompt included: nothing can be generated"
            )
        return self.min_length + extra, self.max_length + extra


@dataclass(frozen=True, kw_only=True, slots=True)
class NucleusConfig(DecodingConfig):
    """How captions are sampled; the defaults are CapFilt's (BLIP, Sec. 3.3, and its code).

    Scores go through the repetition penalty, the minimal length, temperature, top-k and top-p, in
    this order, each as transformers' processor of that name.
    """

    top_p: float = 0.9  # sample among the likeliest tokens that together reach this probability
    temperature: float = 1.0
    # Sample among at most so many tokens. The paper names top_p alone; BLIP's code left this to
    # transformers, whose default then was 50.
    top_k: int | None = None
    repetition_penalty: float = 1.1

    def __post_init__(self) -> None:
        DecodingConfig.__post_init__(self)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; a probability above 0 was expected")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; greedy decoding is `greedy`")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; None allows every token")


def uniform_draws(
    seed: int, captions: Sequence[tuple[str, int]], num_tokens: int, device: torch.device | str
) -> Tensor:
    """Return the random numbers of captions, (R, num_tokens) float32 in [0, 1).

    A caption is named by the key of its sample and its number among the captions of that sample.
    The draw of token t is a function of (seed, key, number, t) alone: no batch, worker, order or
    length changes it.
    """
    table = np.empty((len(captions), num_tokens), dtype="<u4")
    for row, (key, number) in zip(table, captions, strict=True):
        name = f"{seed}\n{number}\n{key}".encode()
        row[:] = np.frombuffer(hashlib.shake_128(name).digest(4 * num_tokens), dtype="<u4")
    # 24 bits: what float32 holds exactly, so that no draw is rounded up to 1.
    return torch.from_numpy((table >> 8).astype(np.float32) / 2**24).to(device)


@torch.no_grad()
def nucleus(
    decoder: Decoder[State],
    state: State,
    prompt_ids: Tensor,
    config: NucleusConfig,
    draws: Tensor,
) -> Tensor:
    """Sample captions from the smallest set of tokens that has probability `top_p`.

    (BLIP, Sec. 3.3; Holtzman et al. 2020.) `prompt_ids` is (B, T) int64, without padding; `draws`
    (R, at least L - T) float32 comes from `uniform_draws`, R a multiple of B. Returns (R, L) int64:
    the prompt, the caption, its end, then padding. Apart from rounding inside the model, a caption
    is a function of its image, its prompt and its draws. Raises ValueError for other shapes.
    """
    prompt_length = prompt_ids.shape[1]
    num_new = config.total_lengths(prompt_length)[1] - prompt_length
    if len(draws) % len(prompt_ids) or draws.shape[1] < num_new:
        raise ValueError(
            f"draws are {tuple(draws.shape)}; {len(prompt_ids)} prompts and up to {num_new} new "
            f"tokens need (a multiple of {len(prompt_ids)}, {num_new} or more)"
        )

    def choose(scores: Tensor, number: int) -> Tensor:
        scores = scores / config.temperature
        return draw_from_nucleus(scores, draws[:, number], config.top_p, config.top_k)

    return _decode(decoder, state, prompt_ids, config, choose, len(draws) // len(prompt_ids))


@torch.no_grad()
def greedy(
    decoder: Decoder[State], state: State, prompt_ids: Tensor, config: DecodingConfig
) -> Tensor:
    """Return captions of the likeliest token at every step, (B, L) int64 with `prompt_ids` (B, T).

    The prompt, the caption, its end, then padding.
    """

    def choose(scores: Tensor, number: int) -> Tensor:
        return scores.argmax(dim=1)

    return _decode(decoder, state, prompt_ids, config, choose, 1)


def _decode(
    decoder: Decoder[State],
    state: State,
    prompt_ids: Tensor,
    config: DecodingConfig,
    choose: Callable[[Tensor, int], Tensor],
    num_captions: int,
) -> Tensor:
    """Read the prompt once an image, then `choose` a token (R,) for every caption at a time."""
    length = prompt_ids.shape[1]
    min_length, max_length = config.total_lengths(length)
    logits, state = decoder.step(prompt_ids, state)
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    rows = rows.repeat_interleave(num_captions)  # (R,)
    if num_captions > 1:
        logits, state = logits.index_select(0, rows), decoder.reorder(state, rows)
    ids = prompt_ids.new_full((len(rows), max_length), config.pad_id)
    ids[:, :length] = prompt_ids.index_select(0, rows)
    is_over = torch.zeros_like(rows, dtype=torch.bool)
    for position in range(length, max_length):
        scores = constrained(
            logits.float(), ids[:, :position], config, may_end=position >= min_length
        )
        tokens = choose(scores, position - length).masked_fill(is_over, config.pad_id)
        ids[:, position] = tokens
        is_over = is_over | (tokens == config.end_id)
        # Elsewhere to ask whether all are over would wait for the device at every token.
        if position + 1 == max_length or (ids.device.type == "cpu" and is_over.all()):
            break
        logits, state = decoder.step(tokens[:, None], state)
    return ids


def constrained(scores: Tensor, ids: Tensor, config: DecodingConfig, *, may_end: bool) -> Tensor:
    """Return (R, V) scores under the repetition penalty for `ids` (R, t), and without an early end.

    A penalised score moves away from zero when negative and towards it when positive, as in
    transformers.
    """
    if config.repetition_penalty != 1.0:
        said = scores.gather(1, ids)
        penalty = config.repetition_penalty
        scores = scores.scatter(1, ids, torch.where(said < 0, said * penalty, said / penalty))
    if not may_end:
        scores = scores.clone()
        scores[:, config.end_id] = -torch.inf
    return scores


def draw_from_nucleus(
    scores: Tensor, draws: Tensor, top_p: float, top_k: int | None = None
) -> Tensor:
    """Draw one token for each row of (R, V) scores before softmax; returns (R,) int64.

    Tokens stand in the order of falling probability, equal ones in that of their ids; those before
    which less than `top_p` has accumulated are in the nucleus. `draws` (R,) in [0, 1) says how far
    to go through the nucleus' mass: the same draw picks the same token on every device, up to
    rounding.
    """
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ordered = ordered[:, :top_k]
    likely = ordered.softmax(dim=1)
    before = likely.cumsum(dim=1) - likely
    is_in = before < top_p
    is_in[:, 0] = True  # also when top_p is less than rounding
    reached = likely.masked_fill(~is_in, 0.0).cumsum(dim=1)
    target = draws[:, None].to(reached.dtype) * reached[:, -1:]
    rank = (reached <= target).sum(dim=1, keepdim=True)
    # A draw next to 1 may be rounded to all of the mass.
    rank = torch.minimum(rank, is_in.sum(dim=1, keepdim=True) - 1)
    return order.gather(1, rank)[:, 0]
