"""The layers of MED, each part of which encoder and decoder share or have apart.

Dims: R rows of text (R = B * n, the n texts of each of B images side by side), S positions that are
computed, T text tokens, P image tokens, D width, h heads.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.bert import AttentionBlock, BertConfig, FeedForward, KeysValues

Role = Literal["encoder", "decoder"]


class Sharing(StrEnum):
    """What encoder and decoder share (BLIP, Sec. 4.4 compares the four)."""

    ALL = "all"
    ALL_BUT_CROSS_ATTENTION = "all but cross-attention"
    ALL_BUT_SELF_ATTENTION = "all but self-attention"
    NONE = "none"


class Places(NamedTuple):
    """Which of all B * n texts the R rows are, when others have left."""

    rows: Tensor  # (R,) int64, below `number`, each once
    number: int  # B * n

    def spread(self, hidden: Tensor) -> Tensor:
        """Return (B * n, S, D): each row of (R, S, D) at its place, zeros elsewhere.

        Empty places are attended from as well: an attention of one shape rounds in one way, and
        what it costs is reading the image's keys.
        """
        every = hidden.new_zeros(self.number, *hidden.shape[1:])
        return every.index_copy_(0, self.rows, hidden)


class MedLayer(nn.Module):
    """Self-attention, cross-attention to the image, feed-forward, each with its residual."""

    def __init__(
        self, config: BertConfig, sharing: Sharing, roles: list[Role], image_width: int | None
    ) -> None:
        """Without `image_width` the layer is for texts alone and has no cross-attention."""
        super().__init__()
        shares_self = sharing in (Sharing.ALL, Sharing.ALL_BUT_CROSS_ATTENTION)
        shares_cross = sharing in (Sharing.ALL, Sharing.ALL_BUT_SELF_ATTENTION)
        shares_any = sharing is not Sharing.NONE
        self.self_attention = by_role(roles, shares_self, lambda: AttentionBlock(config))
        self.cross_attention = by_role(
            roles if image_width is not None else [],
            shares_cross,
            lambda: AttentionBlock(config, context_width=image_width),
        )
        self.ffn = by_role(roles, shares_any, lambda: FeedForward(config))

    def forward(
        self,
        hidden: Tensor,
        role: Role,
        text: KeysValues,
        mask: Tensor,
        image: KeysValues | None,
        places: Places | None = None,
    ) -> Tensor:
        """Return (R, S, D) for `hidden` (R, S, D) that attends to `text` and then to `image`.

        `text` holds what `self_attention_of(role).project` made of the R texts; `mask` is bool,
        True where a position may be seen, broadcastable to (R, h, S, T). Without `image`,
        cross-attention is left out, its residual and norm too. `image` has B rows, R = B * n: the n
        texts of an image become the queries of one attention over its P tokens, so its keys and
        values are read once and never copied. `places` says which texts are here, if not all.
        """
        hidden = self.self_attention_of(role)(hidden, text, mask)
        if image is not None:
            spread = hidden if places is None else places.spread(hidden)
            grouped = spread.reshape(len(image.keys), -1, spread.shape[2])  # (B, n*S, D)
            spread = self.cross_attention_of(role)(grouped, image).view(spread.shape)
            hidden = spread if places is None else spread.index_select(0, places.rows)
        fed: Tensor = of_role(self.ffn, role)(hidden)
        return fed

    def self_attention_of(self, role: Role) -> AttentionBlock:
        """Return the self-attention that `role` uses."""
        attention = of_role(self.self_attention, role)
        assert isinstance(attention, AttentionBlock)
        return attention

    def cross_attention_of(self, role: Role) -> AttentionBlock:
        """Return the cross-attention that `role` uses."""
        attention = of_role(self.cross_attention, role)
        assert isinstance(attention, AttentionBlock)
        return attention


class TextEmbeddings(nn.Module):
    """Word plus position, normalised; BERT's token types are dropped, as in BLIP."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return (R, T, D) for int64 `token_ids` (R, T) at `positions` (T,) or (R, T).

        None counts from 0. Raises ValueError for a text that is longer than the position table.
        """
        if positions is None:
            if token_ids.shape[1] > self.positions.num_embeddings:
                raise ValueError(
                    f"a text of {token_ids.shape[1]} tokens; the model has "
                    f"{self.positions.num_embeddings} positions, so truncate when tokenising"
                )
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        embedded = self.norm(self.words(token_ids) + self.positions(positions))
        dropped: Tensor = self.dropout(embedded)
        return dropped


def by_role(roles: list[Role], is_shared: bool, make: Callable[[], nn.Module]) -> nn.ModuleDict:
    """Make a module for each role, or one for both."""
    if is_shared and roles:
        return nn.ModuleDict({"both": make()})
    return nn.ModuleDict({role: make() for role in roles})


def of_role(modules: nn.ModuleDict, role: Role) -> nn.Module:
    """Return what `role` uses of what `by_role` made; ValueError when it was not built."""
    if "both" in modules:
        return modules["both"]
    if role not in modules:
        raise ValueError(f"this MedText was built without the parts of the {role}")
    return modules[role]
