"""BERT parts that MED and the Q-Former are built from: post-norm blocks with their residual.

Dims: B batch, S rows that attend, K rows attended to, D width, h heads, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class BertConfig:
    """Sizes of a BERT-style stack; the defaults are bert-base-uncased's."""

    vocab_size: int = 30522
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    norm_eps: float = 1e-12
    init_std: float = 0.02


class KeysValues(NamedTuple):
    """What can be attended to, projected once and used by any number of queries.

    Both are (B, h, K, D/h).
    """

    keys: Tensor
    values: Tensor

    def followed_by(self, later: "KeysValues") -> "KeysValues":
        """Concatenate along K: these positions first, then `later`."""
        return KeysValues(
            torch.cat((self.keys, later.keys), dim=2), torch.cat((self.values, later.values), dim=2)
        )

    def rows(self, index: Tensor) -> "KeysValues":
        """Select batch rows by an int64 index (N,); returns (N, h, K, D/h)."""
        return KeysValues(self.keys.index_select(0, index), self.values.index_select(0, index))


class AttentionBlock(nn.Module):
    """Attend, project, drop, add, normalise: BERT's attention, for self- and cross-attention alike.

    Keys and values are projected by `project` and passed in, so that a caller can compute them once
    and share them: image states over captions (BLIP), query states between passes (BLIP-2).
    """

    def __init__(self, config: BertConfig, *, context_width: int | None = None) -> None:
        """`context_width` is the width of what is attended to; None means the block's own."""
        super().__init__()
        width = config.width
        context_width = width if context_width is None else context_width
        if width % config.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {config.num_heads}")
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def project(self, context: Tensor) -> KeysValues:
        """Project (B, K, context_width) states to what `forward` attends to."""
        return KeysValues(self._heads(self.key(context)), self._heads(self.value(context)))

    def forward(self, hidden: Tensor, context: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Return (B, S, D) for `hidden` (B, S, D).

        `mask` is bool, True where the row may attend to the column, broadcastable to (B, h, S, K);
        None lets every row attend to every column.
        """
        query = self._heads(self.query(hidden))
        if hidden.shape[1] == 1 and hidden.device.type == "cpu" and not self.training:
            attended = _attend_from_one(query, context, mask)
        else:
            attended = F.scaled_dot_product_attention(
                query,
                context.keys,
                context.values,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
            )  # (B, h, S, D/h)
        projected = self.output(attended.transpose(1, 2).flatten(2))  # (B, S, D)
        projected = F.dropout(projected, self.dropout, self.training)
        normalised: Tensor = self.norm(hidden + projected)
        return normalised

    def _heads(self, states: Tensor) -> Tensor:
        """Split (B, S, D) into (B, h, S, D/h)."""
        batch, rows, width = states.shape
        return states.view(batch, rows, self.num_heads, width // self.num_heads).transpose(1, 2)


def _attend_from_one(query: Tensor, context: KeysValues, mask: Tensor | None) -> Tensor:
    """Return (B, h, 1, D/h) for one query (B, h, 1, D/h), as a token of a caption is.

    Written out, for the fused kernel shares one query's keys among the processor's threads: how it
    rounds would depend on their number, and on B. This costs the same.
    """
    scores = (query * query.shape[-1] ** -0.5) @ context.keys.transpose(2, 3)  # (B, h, 1, K)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attended: Tensor = scores.softmax(dim=-1) @ context.values
    return attended


class FeedForward(nn.Module):
    """Widen, GELU (erf), narrow, drop, add, normalise."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.width, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, S, D) for `hidden` (B, S, D)."""
        narrowed = F.dropout(self.down(F.gelu(self.up(hidden))), self.dropout, self.training)
        normalised: Tensor = self.norm(hidden + narrowed)
        return normalised


class LanguageHead(nn.Module):
    """Turns hidden states into next-token logits; its projection is the word embedding itself."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Return (B, S, V) logits for `hidden` (B, S, D), tied to `word_embeddings` (V, D)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


def init_bert_weights(module: nn.Module, std: float) -> None:
    """Initialise one module as BERT does: N(0, std) weights, zero biases, LayerNorm (1, 0)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
