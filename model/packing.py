"""Several texts of one image in one row, without padding between them.

Every layer but attention works on tokens, so texts of any length stand end to end; attention is
kept within a text by a mask, and all tokens of an image are queries of one attention to it.

Dims: B images, M columns of a row, n texts of an image, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Rows of a matrix product are computed in tiles. In whole tiles a row's rounding does not depend on
# how many rows there are; in a rest that is handled otherwise it does.
TILE = 16
NO_TEXT = -1


def whole_tiles(number: int) -> int:
    """Return the least multiple of TILE that is no less, and at least one."""
    return max(1, -(-number // TILE)) * TILE


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """The texts of B images. What is padding is a text of its own, which no one looks at."""

    token_ids: Tensor  # (B, M) int64
    positions: Tensor  # (B, M) int64, of a token in its text
    text_of: Tensor  # (B, M) int64: which of its image's texts a token is of; NO_TEXT on padding
    first: Tensor  # (B, n) int64: the column of each text's first token; 0 where there is no text

    @classmethod
    def of(cls, texts: Sequence[Sequence[Sequence[int]]], *, pad_id: int = 0) -> Self:
        """Pack token ids, image by image and text by text; M and n are whole tiles."""
        columns = whole_tiles(max(sum(map(len, each)) for each in texts))
        shape = len(texts), columns
        token_ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
        text_of = torch.full(shape, NO_TEXT)
        first = torch.zeros(len(texts), whole_tiles(max(map(len, texts))), dtype=torch.int64)
        for image, each in enumerate(texts):
            start = 0
            for number, ids in enumerate(each):
                stop = start + len(ids)
                token_ids[image, start:stop] = torch.tensor(ids, dtype=torch.int64)
                positions[image, start:stop] = torch.arange(len(ids))
                text_of[image, start:stop] = number
                first[image, number] = start
                start = stop
        return cls(token_ids, positions, text_of, first)

    def starting_with(self, token_id: int) -> "PackedTexts":
        """Return the same texts with another first token: [ENC]."""
        is_first = (self.positions == 0) & (self.text_of != NO_TEXT)
        token_ids = self.token_ids.masked_fill(is_first, token_id)
        return PackedTexts(token_ids, self.positions, self.text_of, self.first)

    def to(self, device: torch.device | str) -> "PackedTexts":
        """Return the same texts on another device."""
        parts = (self.token_ids, self.positions, self.text_of, self.first)
        return PackedTexts(*(part.to(device, non_blocking=True) for part in parts))

    def mask(self) -> Tensor:
        """Return (B, 1, M, M) bool: a token attends to the tokens of its text."""
        return (self.text_of[:, :, None] == self.text_of[:, None, :])[:, None]

    def firsts(self, hidden: Tensor) -> Tensor:
        """Return (B, n, D), the first tokens' rows of (B, M, D)."""
        return hidden.gather(1, self.first[:, :, None].expand(-1, -1, hidden.shape[2]))
