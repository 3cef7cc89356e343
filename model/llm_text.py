"""What the LLM of stage 2 reads and is asked to write: token ids, padding and targets.

Everything here is a function of its arguments: a tokenizer is asked for the ids of a text, never
for padding or truncation, whose sides and lengths it would remember.

Dims: B batch, T text tokens, S suffix tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from model.losses import IGNORED


@dataclass(frozen=True, slots=True)
class PaddedText:
    """`token_ids` (B, T) int64 and `is_real` (B, T) bool, False on padding."""

    token_ids: Tensor
    is_real: Tensor

    def to(self, device: torch.device | str) -> "PaddedText":
        """Return the batch on a device."""
        return PaddedText(self.token_ids.to(device), self.is_real.to(device))


@dataclass(frozen=True, slots=True)
class CausalText:
    """What a decoder-only LLM learns from: `text`, padded on the right, and its `targets`.

    `targets` is (B, T) int64, `IGNORED` on prompts and padding. The first token of a text is a
    target: the last query predicts it.
    """

    text: PaddedText
    targets: Tensor

    def to(self, device: torch.device | str) -> "CausalText":
        """Return the batch on a device."""
        return CausalText(self.text.to(device), self.targets.to(device))


@dataclass(frozen=True, slots=True)
class PrefixText:
    """What an encoder-decoder LLM learns from: a `prefix` to read, (B, T), a `suffix`, (B, S)."""

    prefix: PaddedText
    suffix: PaddedText

    def to(self, device: torch.device | str) -> "PrefixText":
        """Return the batch on a device."""
        return PrefixText(self.prefix.to(device), self.suffix.to(device))

    @property
    def targets(self) -> Tensor:
        """Return (B, S) int64: the suffix, `IGNORED` on padding."""
        return self.suffix.token_ids.masked_fill(~self.suffix.is_real, IGNORED)


@dataclass(frozen=True, slots=True)
class LlmTokenizer:
    """A tokenizer and the ids that its LLM needs around a text.

    `start_ids` open every text of a decoder-only LLM (OPT: `</s>`; none for models without such a
    token); `stop_id` ends what is generated: the newline, or the end token of an encoder-decoder.
    """

    tokenizer: PreTrainedTokenizerBase
    start_ids: tuple[int, ...]
    stop_id: int
    pad_id: int

    @classmethod
    def for_causal(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        has_bos: bool | None = None,
        stops_at_newline: bool = True,
    ) -> Self:
        """Read the ids off the tokenizer of a decoder-only LLM (BLIP-2, Sec. 3.3).

        Texts open with BOS if `has_bos`, or by None if the tokenizer itself puts something there;
        OPT needs it, and not every version of its tokenizer does so. They end in a newline, as in
        BLIP-2, or else in the end token. Raises ValueError when the tokenizer lacks one of them.
        """
        start = _opening(tokenizer) if has_bos is None else ()
        if has_bos:
            start = (_required(tokenizer, "bos_token_id", "pass has_bos=False"),)
        stop = _newline(tokenizer) if stops_at_newline else None
        if stop is None:
            stop = _required(tokenizer, "eos_token_id", "pass stops_at_newline=True")
        # Padding is masked wherever it stands, so a tokenizer without such a token will do.
        pad = tokenizer.pad_token_id
        return cls(tokenizer, start, stop, stop if pad is None else pad)

    @classmethod
    def for_llm(cls, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Self:
        """Read the ids off the tokenizer of the LLM with this configuration, as BLIP-2 uses it."""
        if config.is_encoder_decoder:
            return cls.for_encoder_decoder(tokenizer)
        return cls.for_causal(tokenizer, has_bos=True if config.model_type == "opt" else None)

    @classmethod
    def for_encoder_decoder(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Read the ids off a T5's tokenizer. Raises ValueError when it lacks one of them."""
        advice = "use the tokenizer that belongs to the LLM"
        stop = _required(tokenizer, "eos_token_id", advice)
        return cls(tokenizer, (), stop, _required(tokenizer, "pad_token_id", advice))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, without anything around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def decode(self, token_ids: Tensor) -> list[str]:
        """Return the texts of generated ids (B, T), up to their stop, stripped."""
        texts = []
        for row in token_ids.tolist():
            kept = row[: row.index(self.stop_id)] if self.stop_id in row else row
            text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
            texts.append(text.strip())
        return texts


def causal_text(
    tokenizer: LlmTokenizer,
    captions: Sequence[str],
    *,
    prompts: str | Sequence[str] = "",
    max_length: int = 32,
) -> CausalText:
    """Return what a decoder-only LLM learns captions from: BOS, prompt, caption, stop.

    `prompts` is one for all captions or one each; a space parts it from its caption, and neither it
    nor BOS before it is a target. Without a prompt BOS is one. A text has at most `max_length`
    tokens. Where the released code lets a long caption lose its stop, it loses its last words here:
    the stop is what ends a generated caption. Raises ValueError for another number of prompts, or
    when a prompt fills or is not a prefix of its tokenised text.
    """
    every = _one_each(prompts, len(captions), "prompts")
    room = max_length - 1
    rows, prompt_lengths = [], []
    for caption, prompt in zip(captions, every, strict=True):
        text = f"{prompt} {caption}" if prompt else caption
        row = [*tokenizer.start_ids, *tokenizer.ids(text)][:room]
        start = [*tokenizer.start_ids, *tokenizer.ids(prompt)] if prompt else []
        if row[: len(start)] != start or len(row) == len(start) > 0:
            raise ValueError(
                f"the prompt {prompt!r} leaves no room in max_length {max_length}, or its last "
                f"token changes before {caption!r}; shorten it, or end it in a whole word"
            )
        rows.append([*row, tokenizer.stop_id])
        prompt_lengths.append(len(start))
    text_batch = padded(rows, tokenizer.pad_id)
    position = torch.arange(text_batch.token_ids.shape[1])
    is_target = text_batch.is_real & (position >= torch.tensor(prompt_lengths)[:, None])
    return CausalText(text_batch, text_batch.token_ids.masked_fill(~is_target, IGNORED))


def prefix_text(
    tokenizer: LlmTokenizer,
    prefixes: Sequence[str],
    suffixes: Sequence[str],
    *,
    max_length: int = 32,
) -> PrefixText:
    """Return what an encoder-decoder LLM learns from: prefix and suffix, each with its end token.

    Pretraining splits captions by `split_caption`; fine-tuning reads a prompt and writes the
    caption or the answer. Each side has at most `max_length` tokens, end included. Raises
    ValueError when the numbers of prefixes and suffixes differ.
    """
    rows = [
        [[*tokenizer.ids(text)[: max_length - 1], tokenizer.stop_id] for text in side]
        for side in (_one_each(prefixes, len(suffixes), "prefixes"), suffixes)
    ]
    return PrefixText(*(padded(side, tokenizer.pad_id) for side in rows))


def prompt_text(
    tokenizer: LlmTokenizer,
    prompts: Sequence[str],
    *,
    is_encoder_decoder: bool,
    max_length: int = 32,
) -> PaddedText:
    """Return prompts to generate from, (B, T), padded on the left, where nothing is continued.

    Decoder-only: BOS and the prompt. Encoder-decoder: the prompt and the end token.
    """
    end = [tokenizer.stop_id] if is_encoder_decoder else []
    opened = [[*tokenizer.start_ids, *tokenizer.ids(prompt)] for prompt in _many(prompts)]
    rows = [row[: max_length - len(end)] + end for row in opened]
    return padded(rows, tokenizer.pad_id, on_the_left=True)


def split_caption(caption: str, *, seed: int, key: str, epoch: int = 0) -> tuple[str, str]:
    """Split a caption into the prefix to read and the suffix to write (BLIP-2, Sec. 3.3).

    After one word up to after half of them, each as likely: no released data has such a split, the
    authors describe it so. It falls between words, so that tokens stay what they are. A single word
    is all suffix. The same (seed, key, epoch) splits the same caption in the same place.
    """
    words = caption.split()
    if len(words) < 2:
        return "", " ".join(words)
    digest = hashlib.shake_128(f"{seed}\n{epoch}\n{key}".encode()).digest(8)
    # 64 bits over a few dozen places: the bias of the remainder is below 1e-17.
    first = 1 + int.from_bytes(digest, "little") % (len(words) // 2)
    return " ".join(words[:first]), " ".join(words[first:])


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, on_the_left: bool = False) -> PaddedText:
    """Return rows of ids as one (B, T) batch, T that of the longest."""
    longest = max(map(len, rows), default=0)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    is_real = torch.zeros_like(ids, dtype=torch.bool)
    for row, target, real in zip(rows, ids, is_real, strict=True):
        where = slice(longest - len(row), None) if on_the_left else slice(len(row))
        target[where] = torch.tensor(row, dtype=torch.int64)
        real[where] = True
    return PaddedText(ids, is_real)


def _many(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValueError(f"a list of texts was expected, one an image, not {texts!r} alone")
    return texts


def _one_each(texts: str | Sequence[str], number: int, name: str) -> Sequence[str]:
    every = [texts] * number if isinstance(texts, str) else texts
    if len(every) != number:
        raise ValueError(f"{len(every)} {name} for {number} texts")
    return every


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text by itself."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    dressed = tokenizer("a").input_ids
    for first in range(len(dressed) - len(plain) + 1):
        if dressed[first : first + len(plain)] == plain:
            return tuple(dressed[:first])
    raise ValueError(f"{type(tokenizer).__name__} does not keep a text's ids among special tokens")


def _newline(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that a newline behind a word becomes."""
    word = tokenizer("a", add_special_tokens=False).input_ids
    line = tokenizer("a\n", add_special_tokens=False).input_ids
    unknown = tokenizer.unk_token_id
    if len(line) != len(word) + 1 or line[:-1] != word or line[-1] == unknown:
        raise ValueError(
            f"{type(tokenizer).__name__} has no token of its own for a newline, where BLIP-2 stops "
            f"captions; pass stops_at_newline=False to stop at the end token"
        )
    return int(line[-1])


def _required(tokenizer: PreTrainedTokenizerBase, name: str, advice: str) -> int:
    found = getattr(tokenizer, name)
    if found is None:
        raise ValueError(f"{type(tokenizer).__name__} has no {name}; {advice}")
    return int(found)
