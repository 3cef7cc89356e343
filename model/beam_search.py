"""Beam search: the likeliest captions, searched several at a time, as in transformers 5.

Dims: B images, k beams of an image, R = B * k rows, T tokens of the prompt, L the longest caption
with its prompt, V vocabulary.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from model.generation import Decoder, DecodingConfig, State, constrained

_IMPOSSIBLE = -1e9  # a score that no caption has; finite, so that sums and products stay numbers


class EarlyStopping(StrEnum):
    """When the open beams of an image are given up for those that have ended."""

    HEURISTIC = "heuristic"  # the best open beam is, at its present length, worse than all ended
    FIRST = "first"  # as many captions as beams have ended
    NEVER = "never"  # no open beam can become better than all ended ones


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamConfig(DecodingConfig):
    """How captions are searched; the defaults are BLIP's for captioning (BLIP, Sec. 5.2).

    A caption's score is the sum of its tokens' processed log-probabilities, the end included, over
    its length to the power of `length_penalty`.
    """

    num_beams: int = 3
    length_penalty: float = 1.0  # above 0 long captions gain, below 0 they lose
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    # False: the new tokens and the end, as in transformers 5. True: the prompt too, but
    # not the end, as in transformers 4.33 and before, with which the references decode.
    score_length_counts_prompt: bool = False

    def __post_init__(self) -> None:
        DecodingConfig.__post_init__(self)
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; at least one is needed")


@dataclass(frozen=True, slots=True)
class FoundCaptions:
    """The best caption of each image: `ids` (B, L) int64, padded; `scores` (B,) float32."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class _Beams:
    """Captions of each image, best first: `ids` (B, n, L), `scores` (B, n)."""

    ids: Tensor
    scores: Tensor

    def best(self, scores: Tensor, number: int) -> tuple["_Beams", Tensor]:
        """Return those that are best by other `scores` (B, n), which they get, and their index."""
        top, index = scores.topk(number, dim=1)
        return _Beams(_pick(self.ids, index), top), index


@torch.no_grad()
def beam_search(
    decoder: Decoder[State], state: State, prompt_ids: Tensor, config: BeamConfig
) -> FoundCaptions:
    """Return the best caption that the search finds for each image.

    `prompt_ids` is (B, T) int64 without padding, but a row of nothing else stands for no image, and
    nothing is found for it. `state` has B rows: each prompt is read once. The
    ids hold the prompt, the caption, its end if it came before `max_length`, then padding.
    """
    (batch, first), k = prompt_ids.shape, config.num_beams
    max_length = config.total_lengths(first)[1]
    logits, state = decoder.step(prompt_ids, state)
    rows = torch.arange(batch, device=prompt_ids.device)
    every = rows.repeat_interleave(k)  # (R,)
    logits, state = logits.index_select(0, every), decoder.reorder(state, every)
    open_beams, ended = _start(prompt_ids, config, max_length)
    may_improve = prompt_ids[:, 0] != config.pad_id
    for length in range(first, max_length):
        candidates, source = _continue(logits, open_beams, first, length, config)
        is_end = candidates.ids[:, :, length] == config.end_id
        is_over = torch.ones_like(is_end) if length + 1 == max_length else is_end
        ended = _add_ended(ended, candidates, is_over, may_improve, (first, length), config)
        scores = candidates.scores + is_over * _IMPOSSIBLE
        open_beams, chosen = candidates.best(scores, k)
        may_improve = may_improve & _may_improve(open_beams, ended, first, length + 1, config)
        is_full = (ended.scores > _IMPOSSIBLE / 2).all()
        is_enough = config.early_stopping is EarlyStopping.FIRST and bool(is_full)
        if length + 1 == max_length or is_enough or not may_improve.any():
            break
        source = source.gather(1, chosen)  # (B, k)
        state = decoder.reorder(state, (source + rows[:, None] * k).flatten())
        logits, state = decoder.step(open_beams.ids[:, :, length].reshape(-1, 1), state)
    return FoundCaptions(ended.ids[:, 0], ended.scores[:, 0])


def _start(prompt_ids: Tensor, config: BeamConfig, max_length: int) -> tuple[_Beams, _Beams]:
    """Return k open beams, of which only the first counts as yet, and no ended ones."""
    batch, length = prompt_ids.shape
    ids = prompt_ids.new_full((batch, config.num_beams, max_length), config.pad_id)
    ids[:, :, :length] = prompt_ids[:, None, :]
    impossible = torch.full(ids.shape[:2], _IMPOSSIBLE, device=ids.device)
    scores = impossible.clone()
    scores[:, 0] = 0.0  # else all beams would be the same
    return _Beams(ids, scores), _Beams(ids, impossible)


def _continue(
    logits: Tensor, beams: _Beams, first: int, length: int, config: BeamConfig
) -> tuple[_Beams, Tensor]:
    """Return the 2k best continuations of each image's beams by one token, and their beams (B, 2k).

    With 2k, at least k of them go on when the others end.
    """
    batch, k, _ = beams.ids.shape
    log_probs = constrained(
        logits.float().log_softmax(dim=1),
        beams.ids.flatten(0, 1)[:, :length],
        config,
        may_end=length >= config.total_lengths(first)[0],
    ).view(batch, k, -1)
    totals = (log_probs + beams.scores[:, :, None]).flatten(1)  # (B, k*V)
    scores, index = totals.topk(2 * k, dim=1)
    source = index // log_probs.shape[2]
    ids = _pick(beams.ids, source)
    ids[:, :, length] = index % log_probs.shape[2]
    return _Beams(ids, scores), source


def _add_ended(
    ended: _Beams,
    candidates: _Beams,
    is_over: Tensor,
    may_improve: Tensor,
    lengths: tuple[int, int],
    config: BeamConfig,
) -> _Beams:
    """Return the k best of the captions that had ended and of those candidates that end now.

    Only the first k candidates may: the others are there to go on. An image whose beams were given
    up takes none.
    """
    first, length = lengths
    k = config.num_beams
    is_end = candidates.ids[:, :, length] == config.end_id
    num_tokens = torch.full_like(candidates.scores, length + 1 - first)
    if config.score_length_counts_prompt:
        num_tokens = length + 1 - is_end.to(candidates.scores.dtype)
    counts = is_over & may_improve[:, None]
    counts[:, k:] = False
    if config.early_stopping is EarlyStopping.FIRST:
        counts = counts & (ended.scores <= _IMPOSSIBLE / 2).any(dim=1, keepdim=True)
    scores = candidates.scores / num_tokens**config.length_penalty
    scores = scores.masked_fill(~counts, _IMPOSSIBLE)
    both = _Beams(torch.cat((ended.ids, candidates.ids), dim=1), scores)
    return both.best(torch.cat((ended.scores, scores), dim=1), k)[0]


def _may_improve(
    open_beams: _Beams, ended: _Beams, first: int, length: int, config: BeamConfig
) -> Tensor:
    """Say for which images (B,) the best open beam may yet become better than an ended one."""
    best_length = length
    if config.early_stopping is EarlyStopping.NEVER and config.length_penalty > 0:
        best_length = config.total_lengths(first)[1]
    counted = best_length if config.score_length_counts_prompt else best_length - first
    possible = open_beams.scores[:, 0] / counted**config.length_penalty
    may_improve: Tensor = possible > ended.scores.amin(dim=1)
    return may_improve


def _pick(ids: Tensor, index: Tensor) -> Tensor:
    """Pick captions (B, m, L) out of (B, n, L) by an index (B, m)."""
    return ids.gather(1, index[:, :, None].expand(-1, -1, ids.shape[2]))
