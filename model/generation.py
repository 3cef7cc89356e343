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
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.capfilt import MedCaptioner
from model.med import DecoderState
from model.packing import whole_tiles
from model.qformer import CaptionCache, QFormer

State = TypeVar("State")
Row = npt.NDArray[np.float32]

_MANY_TOKENS = 2048  # a vocabulary that is worth the trouble of not sorting all of it


@dataclass(frozen=True, slots=True)
class Decoder(Generic[State]):
    """What decoding asks of a model.

    `step` reads the next tokens (R, t) int64 of every caption and returns the (R, V) logits of what
    follows, with a state that holds these tokens too; the old state is used up. `reorder` takes a
    state and an int64 index (R',), and continues row i from what was row `index[i]`; a row stays
    with its image. `keep` takes the same, and goes on with these rows alone, the other captions
    being over; None: all rows are decoded until the last is over.
    """

    step: Callable[[Tensor, State], tuple[Tensor, State]]
    reorder: Callable[[State, Tensor], State]
    keep: Callable[[State, Tensor], State] | None = None


def med_decoder(captioner: MedCaptioner) -> Decoder[DecoderState]:
    """Return the decoder of BLIP's captioner; `captioner.begin(pixels, ...)` is its first state.

    Begin with `num_captions` 1, whatever follows, and with room for `max_length` tokens.
    """
    return Decoder(captioner.step, DecoderState.reordered, DecoderState.kept)


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

    (BLIP, Sec. 3.3; Holtzman et al. 2020.) `prompt_ids` is (B, T) int64, without padding; a row of
    nothing else stands for no image, and its captions are over before they begin. `draws` (R, at
    least L - T) float32 comes from `uniform_draws`, R a multiple of B. Returns (R, L) int64:
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

    def choose(scores: Tensor, number: int, rows: Tensor) -> Tensor:
        own = draws[:, number].index_select(0, rows)
        return draw_from_nucleus(scores / config.temperature, own, config.top_p, config.top_k)

    return _decode(decoder, state, prompt_ids, config, choose, len(draws) // len(prompt_ids))


@torch.no_grad()
def greedy(
    decoder: Decoder[State], state: State, prompt_ids: Tensor, config: DecodingConfig
) -> Tensor:
    """Return captions of the likeliest token at every step, (B, L) int64 with `prompt_ids` (B, T).

    The prompt, the caption, its end, then padding. A prompt of padding stands for no image.
    """

    def choose(scores: Tensor, number: int, rows: Tensor) -> Tensor:
        return scores.argmax(dim=1)

    return _decode(decoder, state, prompt_ids, config, choose, 1)


def _decode(
    decoder: Decoder[State],
    state: State,
    prompt_ids: Tensor,
    config: DecodingConfig,
    choose: Callable[[Tensor, int, Tensor], Tensor],
    num_captions: int,
) -> Tensor:
    """Read the prompt once an image, then `choose` a token for every caption at a time.

    `choose` takes scores (R', V), the number of the token, and which captions R' these are.
    """
    length = prompt_ids.shape[1]
    min_length, max_length = config.total_lengths(length)
    logits, state = decoder.step(prompt_ids, state)
    images = torch.arange(len(prompt_ids), device=prompt_ids.device)
    images = images.repeat_interleave(num_captions)  # (R,)
    if num_captions > 1:
        logits, state = logits.index_select(0, images), decoder.reorder(state, images)
    ids = prompt_ids.new_full((len(images), max_length), config.pad_id)
    ids[:, :length] = prompt_ids.index_select(0, images)
    rows = torch.arange(len(images), device=ids.device)  # those that are still decoded
    is_over = ids[:, 0] == config.pad_id
    watch = EndWatch()
    for position in range(length, max_length):
        so_far = ids[:, :position].index_select(0, rows)
        scores = constrained(logits.float(), so_far, config, may_end=position >= min_length)
        tokens = choose(scores, position - length, rows)
        tokens = tokens.masked_fill(is_over.index_select(0, rows), config.pad_id)
        ids[rows, position] = tokens
        is_over[rows] |= tokens == config.end_id
        if position + 1 == max_length or watch.is_seen(is_over):
            break
        staying = _staying(is_over.index_select(0, rows)) if decoder.keep is not None else None
        if staying is not None and decoder.keep is not None:
            state, rows = decoder.keep(state, staying), rows.index_select(0, staying)
            tokens = tokens.index_select(0, staying)
        logits, state = decoder.step(tokens[:, None], state)
    return ids


def _staying(is_over: Tensor) -> Tensor | None:
    """Return the rows (R',) to go on with, or None for all.

    Whole tiles of rows, so that rounding stays what it is: some captions that are over fill the
    last. On an accelerator all stay: one shape is one captured graph, and nobody waits to learn who
    is over.
    """
    if is_over.device.type != "cpu":
        return None
    number = whole_tiles(int((~is_over).sum()))
    if number >= len(is_over):
        return None
    return is_over.int().argsort(stable=True)[:number].sort().values


class EndWatch:
    """Tells when all captions are over. On an accelerator it is told some tokens late.

    To ask the device at every token would wait for it; an answer that comes by itself costs a few
    tokens of padding.
    """

    def __init__(self) -> None:
        """Begin with no question asked."""
        self._asked: tuple[Tensor, Any] | None = None  # torch has no types for its events

    def is_seen(self, is_over: Tensor) -> bool:
        """Say whether all of `is_over` (R,), or of what it was some calls ago, is True."""
        if is_over.device.type != "cuda":
            return bool(is_over.all())
        if self._asked is not None:
            answer, event = self._asked
            if not event.query():
                return False
            if bool(answer):
                return True
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(is_over.all(), non_blocking=True)
        self._asked = answer, torch.cuda.current_stream().record_event()
        return False


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
    likely = scores.softmax(dim=1)
    if likely.device.type != "cpu" or likely.shape[1] < _MANY_TOKENS:
        return _draw_sorted(likely, draws, top_p, top_k)
    tokens = [
        _draw_from_row(row, draw, top_p, top_k)
        for row, draw in zip(likely.numpy(), draws.tolist(), strict=True)
    ]
    return torch.tensor(tokens)


def _draw_sorted(likely: Tensor, draws: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Draw for all rows at once, in the way of devices: nothing here waits for one."""
    ordered, order = likely.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ordered = ordered[:, :top_k]
    mass = ordered.double().cumsum(dim=1)
    limit = top_p if top_k is None else top_p * mass[:, -1:]
    is_in = (mass - ordered < limit) & (ordered > 0)
    is_in[:, 0] = True  # also when top_p is less than rounding
    last = is_in.sum(dim=1, keepdim=True) - 1
    target = draws[:, None].double() * mass.gather(1, last)
    # A draw next to 1 may be rounded to all of the mass.
    rank = torch.minimum((mass <= target).sum(dim=1, keepdim=True), last)
    return order.gather(1, rank)[:, 0]


def _draw_from_row(likely: Row, draw: float, top_p: float, top_k: int | None) -> int:
    """Draw for one row, (V,), as `_draw_sorted` does, but sort no more than may be needed.

    Tokens below (1 - top_p) / V have less than 1 - top_p together, so the nucleus ends before them:
    of a trained model's vocabulary that leaves some hundreds. They are sorted as integers, which is
    several times as fast as floats with their indices: probabilities, being positive, are in the
    order of their bits, and the id stands behind.
    """
    floor = (1 - top_p) / len(likely) if top_k is None else 0.0
    ids = np.flatnonzero(likely > 0.5 * floor)  # half, for the softmax is rounded too
    bits = (~likely[ids].view(np.uint32)).astype(np.uint64)
    keys = np.sort(bits << np.uint64(32) | ids.astype(np.uint64))[:top_k]
    ordered = (~(keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    mass = ordered.cumsum(dtype=np.float64)
    limit = top_p if top_k is None else top_p * mass[-1]
    number = max(1, int(np.searchsorted(mass - ordered, limit)))
    rank = np.searchsorted(mass[:number], draw * mass[number - 1], side="right")
    return int(keys[min(int(rank), number - 1)] & np.uint64(0xFFFFFFFF))
