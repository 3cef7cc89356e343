"""Which position of the Q-Former's input may attend to which, for each pre-training objective.

Dims: B batch, Q query tokens, T text tokens. True means "may attend"; queries stand before text.
"""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(Enum):
    """BLIP-2's three stage-1 objectives, told apart by their self-attention mask (Fig. 2)."""

    ITC = "image-text contrastive"
    ITM = "image-text matching"
    ITG = "image-grounded text generation"


def self_attention_mask(objective: Objective, num_queries: int, text_is_real: Tensor) -> Tensor:
    """Say which Q-Former position may attend to which (BLIP-2, Sec. 3.2).

    `text_is_real` is (B, T) bool, False on padding; every text needs one real token, for a row that
    may attend to nothing has no defined output. Returns (B, Q+T, Q+T) bool, queries first, True
    where the row may attend to the column.
    """
    position = torch.arange(num_queries + text_is_real.shape[1], device=text_is_real.device)
    is_text = position >= num_queries
    same_side = is_text[:, None] == is_text
    causal = position[:, None] >= position
    allowed = {
        Objective.ITC: same_side,  # neither embedding may peek at the other side
        Objective.ITM: torch.ones_like(same_side),  # matching compares all with all
        Objective.ITG: torch.where(is_text[:, None], causal, same_side),  # queries never see text
    }[objective]
    return allowed & F.pad(text_is_real, (num_queries, 0), value=True)[:, None, :]


def columns_mask(num_queries: int, text_is_real: Tensor) -> Tensor:
    """Return (B, 1, 1, Q+T) bool: every row may attend to all queries and all real text.

    With all queries it broadcasts to the ITM mask; with none, to the text block of the ITC mask.
    Spelled out per row it would be Q+T times larger and say nothing more.
    """
    return F.pad(text_is_real, (num_queries, 0), value=True)[:, None, None, :]


def caption_mask(num_queries: int, text_is_real: Tensor) -> Tensor:
    """Return (B, 1, T, Q+T) bool: the text rows of the ITG mask, for text behind cached queries."""
    num_text = text_is_real.shape[1]
    every = text_is_real.new_ones(num_text, num_queries + num_text)
    return every.tril(diagonal=num_queries) & columns_mask(num_queries, text_is_real)
