"""The tokenizer of MED and the Q-Former: loaded and completed, or made of the corpus's own words.

[DEC] and [ENC] follow all other tokens, as in BLIP, where they are 30522 and 30523.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from jobs.errors import UserError
from pipeline.sample import canonical_json

CAPTION_START, MATCH_START = "[DEC]", "[ENC]"
PROMPT = "a picture of"  # what the captioner continues (BLIP, Sec. 4.2, as released)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789,'-?/&%$@+=_"
_NEVER_LEFT_OUT = 2**62
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A BERT tokenizer with [DEC] and [ENC], and the ids that training asks for."""

    tokenizer: PreTrainedTokenizerBase
    num_plain: int  # tokens without [DEC] and [ENC], whose ids are this and the one after it
    pad_id: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> Self:
        """Add [DEC] and [ENC] if they are missing. Raises UserError for a token that is."""
        ids = {
            "[CLS]": tokenizer.cls_token_id,
            "[SEP]": tokenizer.sep_token_id,
            "[PAD]": tokenizer.pad_token_id,
            "[UNK]": tokenizer.unk_token_id,
        }
        if missing := [token for token, number in ids.items() if number is None]:
            raise UserError(
                f"tokenizer {name}: it has no {', no '.join(missing)}; MED and the Q-Former need a "
                "BERT tokenizer, for example training.tokenizer=bert-base-uncased"
            )
        vocabulary = tokenizer.get_vocab()
        num_plain = len(vocabulary.keys() - {CAPTION_START, MATCH_START})
        if CAPTION_START not in vocabulary:
            tokenizer.add_special_tokens({"bos_token": CAPTION_START})
        if MATCH_START not in vocabulary:
            tokenizer.add_special_tokens({"additional_special_tokens": [MATCH_START]})
        found = tokenizer.convert_tokens_to_ids([CAPTION_START, MATCH_START])
        if found != [num_plain, num_plain + 1]:
            raise UserError(
                f"tokenizer {name}: {CAPTION_START} and {MATCH_START} are {found}, not the two ids "
                f"behind its {num_plain:,} other tokens; use the tokenizer before they were added"
            )
        return cls(tokenizer, num_plain, ids["[PAD]"], ids["[SEP]"])

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Return ids (B, max_tokens) int64 behind [CLS], and which are real, bool.

        Every batch has one length: ranks must agree, and a compiled model sees one shape.
        """
        encoded = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=max_tokens
        )
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        return ids, torch.tensor(encoded["attention_mask"], dtype=torch.bool)

    def prompt_ids(self, text: str) -> list[int]:
        """Return [DEC] and the ids of a prompt, as the captioner continues it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.num_plain, *ids]

    def decode(self, ids: Tensor, num_prompt: int) -> list[str]:
        """Return the texts of generated ids (B, L) behind their prompt, up to their end."""
        texts = []
        for row in ids[:, num_prompt:].tolist():
            kept = row[: row.index(self.end_id)] if self.end_id in row else row
            texts.append(str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip())
        return texts


def load_tokenizer(name: str, revision: str | None = None) -> TextTokenizer:
    """Return a BERT tokenizer by its folder or its name on the hub. Raises UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {name!r} can neither be found on this machine nor downloaded "
            f"({str(error).splitlines()[0]}); name a folder, a tokenizer on the hub, or 'corpus'"
        ) from error
    return TextTokenizer.of(tokenizer, name)


def vocabulary_of_words(captions: Iterable[str], vocabulary_size: int) -> list[str]:
    """Return the most frequent words, the same for the same captions in any order.

    Words that are left out are spelled in pieces of one character.
    """
    counts: Counter[str] = Counter(dict.fromkeys(PROMPT.split(), _NEVER_LEFT_OUT))
    for caption in captions:
        counts.update(_WORD.findall(caption.lower()))
    pieces = [*_CHARACTERS, *(f"##{character}" for character in _CHARACTERS)]
    room = vocabulary_size - len(_SPECIAL) - len(pieces)
    words = sorted(counts.keys() - set(pieces), key=lambda word: (-counts[word], word))[:room]
    return [*_SPECIAL, *pieces, *words]


def tokenizer_from_vocabulary(data: bytes) -> TextTokenizer:
    """Return the tokenizer of a vocabulary, a JSON list of tokens."""
    vocabulary = {token: number for number, token in enumerate(json.loads(data))}
    return TextTokenizer.of(BertTokenizer(vocab=vocabulary), "made of the corpus")


def fingerprint_tokenizer(tokenizer: TextTokenizer) -> str:
    """Return 16 hexadecimal digits that name a tokenizer by its tokens and their ids."""
    vocabulary = canonical_json(tokenizer.tokenizer.get_vocab())
    return sha256(vocabulary.encode()).hexdigest()[:16]


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write a folder that transformers' AutoTokenizer loads."""
    tokenizer.tokenizer.save_pretrained(str(folder))
