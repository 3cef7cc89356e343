"""The Q-Former: learned queries that read a frozen image encoder, and a text transformer beside.

Both share their self-attention (BLIP-2, Sec. 3.1); which of them sees the other depends on the
pass, and all but the self-attention treats them apart.
Dims: B images, N rows, Q query tokens, T text tokens, P image tokens, D width, I image width,
h heads, V vocabulary.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bert import (
    AttentionBlock,
    BertConfig,
    FeedForward,
    KeysValues,
    LanguageHead,
    init_bert_weights,
)
from model.masks import Objective, caption_mask, columns_mask, self_attention_mask
from model.names.blip2 import BERT, BERT_UNUSED
from model.names.rename import to_ours


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig(BertConfig):
    """Sizes of a Q-Former; the defaults are the paper's: bert-base-uncased plus [DEC], ViT-g."""

    vocab_size: int = 30523
    num_queries: int = 32
    image_width: int = 1408
    cross_attention_every: int = 2  # layers 0, 2, 4, ... look at the image
    has_text: bool = True  # False: no text embeddings, text FFN or LM head (BLIP-2's stage 2)
    has_language_head: bool = True  # False with text: InstructBLIP's Q-Former


@dataclass(frozen=True, slots=True)
class ImageKeysValues:
    """Images projected once for every cross-attention layer: all that any pass asks of them.

    `layers` has an entry a layer, each (B, h, P, D/h), None where a layer does not look at images.
    `mask` is (B, 1, 1, P) bool, False on image tokens to hide; None hides none. Each image serves
    `rows_per_image` neighbouring rows of a pass, which read its keys and values instead of copies.
    """

    layers: tuple[KeysValues | None, ...]
    mask: Tensor | None = None
    rows_per_image: int = 1

    @property
    def num_images(self) -> int:
        """Return B."""
        return next(layer.keys.shape[0] for layer in self.layers if layer is not None)

    @property
    def num_rows(self) -> int:
        """Return how many rows of a pass these images serve."""
        return self.num_images * self.rows_per_image

    def shared_by(self, rows_per_image: int) -> "ImageKeysValues":
        """Let each image serve this many neighbouring rows (several captions of one image)."""
        return replace(self, rows_per_image=rows_per_image)

    def rows(self, index: Tensor) -> "ImageKeysValues":
        """Copy the images that an int64 index (N,) names; it may repeat some."""
        layers = tuple(None if layer is None else layer.rows(index) for layer in self.layers)
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return ImageKeysValues(layers, mask, self.rows_per_image)


@dataclass(frozen=True, slots=True)
class QueryStates:
    """What the queries made of an image, and what a caption may attend to of them.

    `embeds` is (B, Q, D); `layers` holds each layer's self-attention keys and values of the
    queries, (B, h, Q, D/h).
    """

    embeds: Tensor
    layers: tuple[KeysValues, ...]


@dataclass(frozen=True, slots=True)
class CaptionCache:
    """What the next token of a caption attends to: the queries, then the tokens so far.

    `layers` holds (N, h, Q + num_tokens, D/h) a layer.
    """

    layers: tuple[KeysValues, ...]
    num_tokens: int = 0

    def rows(self, index: Tensor) -> "CaptionCache":
        """Select or repeat captions by an int64 index: reorder beams, or start n per image."""
        return CaptionCache(tuple(layer.rows(index) for layer in self.layers), self.num_tokens)


class QFormerLayer(nn.Module):
    """Shared self-attention, the queries' cross-attention, one FFN for queries and one for text."""

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(config)
        self.cross_attention = (
            AttentionBlock(config, context_width=config.image_width)
            if has_cross_attention
            else None
        )
        self.query_ffn = FeedForward(config)
        self.text_ffn = FeedForward(config) if config.has_text else None

    def project_image(self, image: Tensor) -> KeysValues | None:
        """Return what this layer asks of (B, P, I) image tokens; None where it does not look."""
        return None if self.cross_attention is None else self.cross_attention.project(image)

    def read_both(
        self,
        queries: Tensor,
        text: Tensor,
        mask: Tensor,
        images: Sequence[tuple[KeysValues | None, ImageKeysValues]],
    ) -> tuple[Tensor, Tensor]:
        """Return (N, Q, D) and (N, T, D) after the whole layer.

        Self-attention treats them as one sequence, queries first; `mask` is over its Q+T columns.
        """
        both = torch.cat((queries, text), dim=1)  # (N, Q+T, D)
        attended = self.attention(both, self.attention.project(both), mask)
        num_queries = queries.shape[1]
        read = self.finish_queries(attended[:, :num_queries], images)
        return read, self.finish_text(attended[:, num_queries:])

    def finish_queries(
        self, queries: Tensor, images: Sequence[tuple[KeysValues | None, ImageKeysValues]]
    ) -> Tensor:
        """Return (N, Q, D) after cross-attention, where the layer has it, and the query FFN.

        `images` are groups whose rows follow each other: this layer's keys and values, and the
        images they are of.
        """
        if self.cross_attention is not None:
            seen = []
            sizes = [image.num_rows for _, image in images]
            for group, (context, image) in zip(torch.split(queries, sizes), images, strict=True):
                assert context is not None
                # Rows of one image stand side by side as if they were more of its queries.
                together = group.reshape(image.num_images, -1, group.shape[2])
                seen.append(self.cross_attention(together, context, image.mask).view_as(group))
            queries = torch.cat(seen) if len(seen) > 1 else seen[0]  # (N, Q, D)
        fed: Tensor = self.query_ffn(queries)
        return fed

    def finish_text(self, text: Tensor) -> Tensor:
        """Return (N, T, D) after the text FFN; text never looks at the image itself."""
        assert self.text_ffn is not None, "has_text is False"
        fed: Tensor = self.text_ffn(text)
        return fed


class QFormer(nn.Module):
    """Query tokens and text around one transformer (BLIP-2, Sec. 3.1, Fig. 2).

    Every pass has its name: `encode_image` (queries alone), `encode_text` (text alone),
    `encode_pair` (each sees the other), `decode` (causal text behind the queries), and
    `encode_jointly`, which runs any objective in one pass under its mask and is their reference.
    Token ids are (N, T) int64, `text_is_real` is (N, T) bool, False on padding; a text has at least
    one real token, its first. Text positions start at 0 and queries have none. In training mode
    dropout is active. Passes raise ValueError when text is longer than `max_positions` or the
    Q-Former was built without what they need.
    """

    def __init__(self, config: QFormerConfig) -> None:
        """Initialise as BERT: N(0, 0.02), zero biases; each query FFN a copy of its text FFN."""
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.width))
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, has_cross_attention=i % config.cross_attention_every == 0)
            for i in range(config.num_layers)
        )
        has_head = config.has_text and config.has_language_head
        self.word_embeddings = (
            nn.Embedding(config.vocab_size, config.width) if config.has_text else None
        )
        self.position_embeddings = (
            nn.Embedding(config.max_positions, config.width) if config.has_text else None
        )
        self.language_head = LanguageHead(config) if has_head else None
        self.apply(lambda module: init_bert_weights(module, config.init_std))
        nn.init.normal_(self.query_tokens, std=config.init_std)
        self.copy_text_ffn_to_queries()

    def copy_text_ffn_to_queries(self) -> None:
        """Start every query FFN as its text FFN (as released); without text, keep it as it is."""
        for layer in self._stack():
            if layer.text_ffn is not None:
                layer.query_ffn.load_state_dict(layer.text_ffn.state_dict())

    def load_bert(self, weights: Mapping[str, Tensor]) -> None:
        """Start from a masked-language BERT in transformers' names (BLIP-2, Sec. 3.1).

        Embeddings, self-attention, text FFNs and LM head are taken over, the query FFNs copied
        from the text FFNs; cross-attention, query tokens and vocabulary rows that BERT lacks stay
        as initialised. Raises ValueError that lists missing, unexpected or misshapen tensors.
        """
        ours = {_ours_of_bert(name): value for name, value in weights.items()}
        state = self.state_dict()
        wanted = {
            name
            for name in state
            if name != "query_tokens" and not re.search("cross_attention|query_ffn", name)
        }
        unexpected = {name for name in ours if name is not None} - wanted
        if problems := sorted((wanted - ours.keys()) | unexpected):
            raise ValueError(f"these tensors are missing from BERT's or unexpected: {problems}")
        for name in wanted:
            _copy_rows(name, state[name], ours[name], grows=name in _VOCABULARY_ROWS)
        self.copy_text_ffn_to_queries()

    def project_image(self, image: Tensor, image_is_real: Tensor | None = None) -> ImageKeysValues:
        """Project (B, P, I) image tokens, once, for every pass that will look at them.

        `image_is_real` is (B, P) bool, False on image tokens to hide; None hides none.
        """
        mask = None if image_is_real is None else image_is_real[:, None, None, :]
        return ImageKeysValues(tuple(layer.project_image(image) for layer in self._stack()), mask)

    def encode_image(self, images: ImageKeysValues) -> QueryStates:
        """Read images with the queries alone: ITC's image side, and stage 2 (Sec. 3.2, 3.3)."""
        queries, kept = self._embed_queries(images.num_images), []
        for number, layer in enumerate(self._stack()):
            context = layer.attention.project(queries)
            kept.append(context)
            attended = layer.attention(queries, context)
            queries = layer.finish_queries(attended, _at(number, [images]))
        return QueryStates(queries, tuple(kept))

    def encode_text(
        self, token_ids: Tensor, text_is_real: Tensor, *, first_only: bool = False
    ) -> Tensor:
        """Read text alone: ITC's text side. Returns (N, T, D), padding rows included.

        `first_only` returns state 0, (N, 1, D), and spares the last layer the other rows.
        """
        text, mask = self._embed_text(token_ids), columns_mask(0, text_is_real)
        for number, layer in enumerate(self._stack()):
            context = layer.attention.project(text)
            if first_only and number == self.config.num_layers - 1:
                text = text[:, :1]
            text = layer.finish_text(layer.attention(text, context, mask))
        return text

    def encode_pair(
        self, token_ids: Tensor, text_is_real: Tensor, images: Sequence[ImageKeysValues]
    ) -> Tensor:
        """Read image and text with each seeing the other: ITM. Returns the queries, (N, Q, D).

        `images` are groups whose rows follow each other; together they serve N rows, else
        ValueError. The last layer leaves out the text, of which nobody reads more.
        """
        if (served := sum(image.num_rows for image in images)) != token_ids.shape[0]:
            raise ValueError(
                f"the images serve {served} rows, but there are {len(token_ids)} texts"
            )
        mask = columns_mask(self.config.num_queries, text_is_real)
        queries, text = self._embed_queries(token_ids.shape[0]), self._embed_text(token_ids)
        *all_but_last, last = self._stack()
        for number, layer in enumerate(all_but_last):
            queries, text = layer.read_both(queries, text, mask, _at(number, images))
        context = last.attention.project(torch.cat((queries, text), dim=1))
        attended = last.attention(queries, context, mask)
        return last.finish_queries(attended, _at(len(all_but_last), images))

    def encode_jointly(
        self,
        objective: Objective,
        token_ids: Tensor,
        text_is_real: Tensor,
        images: Sequence[ImageKeysValues],
    ) -> Tensor:
        """Run queries and text in one pass under the objective's mask; returns (N, Q+T, D)."""
        mask = self_attention_mask(objective, self.config.num_queries, text_is_real)[:, None]
        queries, text = self._embed_queries(token_ids.shape[0]), self._embed_text(token_ids)
        for number, layer in enumerate(self._stack()):
            queries, text = layer.read_both(queries, text, mask, _at(number, images))
        return torch.cat((queries, text), dim=1)

    def decode(
        self, token_ids: Tensor, text_is_real: Tensor, queries: Sequence[KeysValues] | None
    ) -> Tensor:
        """Read a caption causally behind the queries of `encode_image`: ITG. Returns (N, T, D).

        Exact, because queries never see text; it saves the query rows of a joint pass. None masks
        the queries from the text: what follows is told by the text alone.
        """
        text = self._embed_text(token_ids)
        mask = caption_mask(0 if queries is None else self.config.num_queries, text_is_real)
        for number, layer in enumerate(self._stack()):
            own = layer.attention.project(text)
            context = own if queries is None else queries[number].followed_by(own)
            text = layer.finish_text(layer.attention(text, context, mask))
        return text

    def decode_step(self, new_ids: Tensor, cache: CaptionCache) -> tuple[Tensor, CaptionCache]:
        """Read the next tokens of captions, (N, t) int64 without padding.

        Returns their states (N, t, D) and the cache that holds them too.
        """
        num_new = new_ids.shape[1]
        text, mask, kept = self._embed_text(new_ids, first=cache.num_tokens), None, []
        if num_new > 1:
            past = cache.layers[0].keys.shape[2]
            every = torch.ones(num_new, past + num_new, dtype=torch.bool, device=new_ids.device)
            mask = every.tril(diagonal=past)  # (t, Q + tokens so far + t)
        for layer, seen in zip(self._stack(), cache.layers, strict=True):
            context = seen.followed_by(layer.attention.project(text))
            kept.append(context)
            text = layer.finish_text(layer.attention(text, context, mask))
        return text, CaptionCache(tuple(kept), cache.num_tokens + num_new)

    def next_token_logits(self, states: Tensor) -> Tensor:
        """Turn (..., D) states of `decode` or `decode_step` into (..., V) logits."""
        if self.language_head is None or self.word_embeddings is None:
            raise ValueError("this Q-Former has no language head: see QFormerConfig.has_text")
        logits: Tensor = self.language_head(states, self.word_embeddings.weight)
        return logits

    def _embed_queries(self, num_rows: int) -> Tensor:
        queries = self.embedding_norm(self.query_tokens).expand(num_rows, -1, -1)  # (N, Q, D)
        return F.dropout(queries, self.config.dropout, self.training)

    def _embed_text(self, token_ids: Tensor, first: int = 0) -> Tensor:
        if self.word_embeddings is None or self.position_embeddings is None:
            raise ValueError("this Q-Former reads no text: it was built with has_text=False")
        last = first + token_ids.shape[1]
        if last > self.config.max_positions:
            raise ValueError(f"{last} text tokens; max_positions is {self.config.max_positions}")
        words = self.word_embeddings(token_ids) + self.position_embeddings.weight[first:last]
        return F.dropout(self.embedding_norm(words), self.config.dropout, self.training)

    def _stack(self) -> list[QFormerLayer]:
        return [cast(QFormerLayer, layer) for layer in self.layers]


# A Q-Former's vocabulary is BERT's and then some.
_VOCABULARY_ROWS = ("word_embeddings.weight", "language_head.bias")


def _ours_of_bert(name: str) -> str | None:
    """Return our name, or None for what a Q-Former has no use for; an unknown name stays."""
    if any(re.fullmatch(pattern, name) for pattern in BERT_UNUSED):
        return None
    modern = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # as the oldest files have it
    modern = modern.replace("LayerNorm.beta", "LayerNorm.bias")
    return to_ours(modern, BERT) or name


def _copy_rows(name: str, target: Tensor, source: Tensor, *, grows: bool) -> None:
    fits = source.shape[1:] == target.shape[1:] and source.shape[0] <= target.shape[0]
    if not fits or (source.shape[0] < target.shape[0] and not grows):
        raise ValueError(f"{name} is {tuple(target.shape)}, BERT's is {tuple(source.shape)}")
    target[: source.shape[0]].copy_(source)


def _at(
    number: int, images: Iterable[ImageKeysValues]
) -> list[tuple[KeysValues | None, ImageKeysValues]]:
    return [(image.layers[number], image) for image in images]
