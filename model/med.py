"""BLIP's mixture of encoder-decoder (MED): one text stack with three functionalities.

A layer holds self-attention, cross-attention to the image and a feed-forward network. Encoder and
decoder share all but self-attention (BLIP, Sec. 3.2), so a module that both use is stored once,
under the name `both`, and no weight has two names.

Dims: B images, R rows of text (R = B * n, the n texts of an image side by side), T text tokens,
P image tokens, D width, C width of the image tokens, h heads, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import cast

import torch
from torch import Tensor, nn

from model.bert import BertConfig, KeysValues, LanguageHead, init_bert_weights
from model.med_layers import MedLayer, Places, Role, Sharing, TextEmbeddings, by_role, of_role
from model.names.blip import bert_name, modern_bert_name
from model.packing import PackedTexts

ImageKeysValues = tuple[KeysValues, ...]  # one for each layer; keys and values are (B, h, P, D/h)


class Functionality(StrEnum):
    """The three ways to run the text stack (BLIP, Sec. 3.1)."""

    UNIMODAL_ENCODER = "unimodal encoder"  # [CLS] text, no image
    IMAGE_GROUNDED_ENCODER = "image-grounded encoder"  # [ENC] text, cross-attention
    IMAGE_GROUNDED_DECODER = "image-grounded decoder"  # [DEC] text, cross-attention, causal


@dataclass(frozen=True, kw_only=True, slots=True)
class MedConfig:
    """Sizes of the text stack and its special tokens; the defaults are BLIP's with a ViT-B."""

    bert: BertConfig = field(default_factory=lambda: BertConfig(vocab_size=30524))
    image_width: int = 768  # of the image tokens; 1024 with a ViT-L
    sharing: Sharing = Sharing.ALL_BUT_SELF_ATTENTION
    caption_start_id: int = 30522  # [DEC], in place of [CLS], starts what the decoder reads
    match_start_id: int = 30523  # [ENC], in place of [CLS], starts what the matcher reads

    def __post_init__(self) -> None:
        last = max(self.caption_start_id, self.match_start_id)
        if last >= self.bert.vocab_size:
            raise ValueError(
                f"the vocabulary has {self.bert.vocab_size} entries, but [DEC] is "
                f"{self.caption_start_id} and [ENC] is {self.match_start_id}"
            )


TINY_MED = MedConfig(
    bert=BertConfig(
        vocab_size=130, width=64, num_layers=3, num_heads=4, ffn_width=128, max_positions=32
    ),
    image_width=48,
    caption_start_id=128,
    match_start_id=129,
)


@dataclass(frozen=True, slots=True)
class DecoderState:
    """What a caption in progress can be continued from: the image, and the tokens so far.

    `image` has B images and is never expanded to captions. `text` holds, for each layer, the keys
    and values of R captions, (R, h, max_length, D/h), of which the first `length` columns are
    written; rows are image-major, so image b owns rows b*n .. b*n + n-1, unless some have left, and
    `places` says who stayed. `MedText.step` writes into `text` in place and returns a state with a
    larger `length`: the old one is then used up.
    """

    image: ImageKeysValues
    text: ImageKeysValues
    length: int
    places: Places | None = None

    def reordered(self, rows: Tensor) -> "DecoderState":
        """Continue row i from what was row `rows[i]`, an int64 (R',) index; for beam search.

        Images stay as they are: a row must come from the same image, and R' be a multiple of B.
        """
        return DecoderState(self.image, tuple(kv.rows(rows) for kv in self.text), self.length)

    def repeated(self, num_captions: int) -> "DecoderState":
        """Continue every row `num_captions` times; the copies stand side by side.

        A prompt that all captions of an image share is read once that way.
        """
        num_rows = len(self.text[0].keys)
        rows = torch.arange(num_rows, device=self.text[0].keys.device)
        return self.reordered(rows.repeat_interleave(num_captions))

    def kept(self, rows: Tensor) -> "DecoderState":
        """Go on with some rows only, a rising int64 (R',) index; the other captions are over."""
        text = tuple(kv.rows(rows) for kv in self.text)
        if self.places is not None:
            places = Places(self.places.rows.index_select(0, rows), self.places.number)
        else:
            places = Places(rows, len(self.text[0].keys))
        return DecoderState(self.image, text, self.length, places)

    def for_images(self, images: Tensor) -> "DecoderState":
        """Go on with some images only, an int64 (B',) index, and all of their captions."""
        per_image = len(self.text[0].keys) // len(self.image[0].keys)
        caption = torch.arange(per_image, device=images.device)
        rows = (images[:, None] * per_image + caption).flatten()  # (B' * n,)
        image = tuple(kv.rows(images) for kv in self.image)
        return DecoderState(image, self.reordered(rows).text, self.length)


class MedText(nn.Module):
    """The text stack: encodes a text, encodes it beside an image, or decodes it from an image."""

    def __init__(
        self,
        config: MedConfig,
        functionalities: frozenset[Functionality] = frozenset(Functionality),
    ) -> None:
        """Build only what `functionalities` need: a captioner has no encoder, a filter no head."""
        super().__init__()
        self.config = config
        roles: list[Role] = []
        if functionalities - {Functionality.IMAGE_GROUNDED_DECODER}:
            roles.append("encoder")
        if Functionality.IMAGE_GROUNDED_DECODER in functionalities:
            roles.append("decoder")
        is_unimodal = functionalities == {Functionality.UNIMODAL_ENCODER}
        image_width = None if is_unimodal else config.image_width
        shares_any = config.sharing is not Sharing.NONE
        self.embeddings = by_role(roles, shares_any, lambda: TextEmbeddings(config.bert))
        self.layers = nn.ModuleList(
            MedLayer(config.bert, config.sharing, roles, image_width)
            for _ in range(config.bert.num_layers)
        )
        self.head = LanguageHead(config.bert) if "decoder" in roles else None
        self.apply(lambda module: init_bert_weights(module, config.bert.init_std))

    @torch.no_grad()
    def load_bert(self, weights: Mapping[str, Tensor]) -> None:
        """Start from a masked-language BERT in transformers' names (BLIP, Sec. 4.1).

        Encoder and decoder start alike. Cross-attention and the vocabulary rows that BERT lacks,
        [DEC] and [ENC], stay as initialised; token types and pooler are left. Raises ValueError
        for a missing or misshapen tensor.
        """
        weights = {modern_bert_name(name): source for name, source in weights.items()}
        for ours, target in self.state_dict().items():
            name = bert_name(ours)
            if name is None:
                continue
            if name not in weights:
                raise ValueError(f"BERT's weights have no {name}, from which {ours} starts")
            source = weights[name]
            rows = len(source) if "words" in ours or ours == "head.bias" else len(target)
            if source.shape != target[:rows].shape:
                raise ValueError(
                    f"{name} is {tuple(source.shape)}, but {ours} is {tuple(target.shape)}"
                )
            target[:rows].copy_(source)

    def encode(
        self, token_ids: Tensor, text_is_real: Tensor, *, first_only: bool = False
    ) -> Tensor:
        """Return (R, T, D) states of texts alone, for `token_ids` (R, T) that start with [CLS].

        `text_is_real` is (R, T) bool, False on padding; every row needs a real token. With
        `first_only` the result is (R, 1, D): the last layer then computes position 0 alone. Raises
        ValueError for a mask that is not bool and for a text longer than the position table.
        """
        return self._encode(token_ids, text_is_real, None, first_only)

    def encode_with_image(
        self,
        token_ids: Tensor,
        text_is_real: Tensor,
        image: ImageKeysValues,
        *,
        first_only: bool = False,
    ) -> Tensor:
        """Return (R, T, D) states of texts that look at an image; position 0 is for matching.

        `token_ids` (R, T) start with [ENC] (see `starting_with`), R being B times the number of
        texts of an image, image-major. `image` comes from `project_image(..., "encoder")`.
        `first_only` is that of `encode`.
        """
        return self._encode(token_ids, text_is_real, image, first_only)

    def _encode(
        self,
        token_ids: Tensor,
        text_is_real: Tensor,
        image: ImageKeysValues | None,
        first_only: bool,
    ) -> Tensor:
        mask = _columns(text_is_real)  # (R, 1, 1, T)
        hidden = self._embeddings("encoder")(token_ids)
        for number, layer in enumerate(self._layers()):
            text = layer.self_attention_of("encoder").project(hidden)
            if first_only and number == len(self.layers) - 1:
                hidden = hidden[:, :1]
            hidden = layer(hidden, "encoder", text, mask, image[number] if image else None)
        return cast(Tensor, hidden)

    def encode_packed(self, texts: PackedTexts, image: ImageKeysValues | None = None) -> Tensor:
        """Return (B, n, D), the states of the first token of each text, packed image by image.

        With `image`, from `project_image(..., "encoder")`, what `encode_with_image` returns of
        texts that start with [ENC]; without, what `encode` does of texts that start with [CLS].
        """
        mask = texts.mask()
        hidden = self._embeddings("encoder")(texts.token_ids, texts.positions)
        for number, layer in enumerate(self._layers()):
            text = layer.self_attention_of("encoder").project(hidden)
            if number == len(self.layers) - 1:
                hidden = texts.firsts(hidden)
                rows = texts.first[:, None, :, None].expand(-1, -1, -1, mask.shape[3])
                mask = mask.gather(2, rows)  # (B, 1, n, M)
            hidden = layer(hidden, "encoder", text, mask, image[number] if image else None)
        return cast(Tensor, hidden)

    def decode(self, token_ids: Tensor, text_is_real: Tensor, image: ImageKeysValues) -> Tensor:
        """Return (R, T, V) next-token logits; a position sees the image and what precedes it.

        `token_ids` (R, T) start with [DEC]; padding stands on the right. `image` comes from
        `project_image(..., "decoder")`.
        """
        length = token_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=token_ids.device).tril()
        mask = causal & _columns(text_is_real)  # (R, 1, T, T)
        hidden = self._embeddings("decoder")(token_ids)
        for layer, context in zip(self._layers(), image, strict=True):
            text = layer.self_attention_of("decoder").project(hidden)
            hidden = layer(hidden, "decoder", text, mask, context)
        return self.predict(hidden)

    def predict(self, hidden: Tensor) -> Tensor:
        """Return (R, T, V) next-token logits for the decoder's states (R, T, D).

        Raises ValueError when this stack was built without its decoder.
        """
        if self.head is None:
            raise ValueError("this MedText was built without the image-grounded decoder")
        logits: Tensor = self.head(hidden, self._embeddings("decoder").words.weight)
        return logits

    def project_image(self, image_embeds: Tensor, role: Role) -> ImageKeysValues:
        """Project (B, P, C) image tokens to what each layer's cross-attention attends to.

        Where encoder and decoder share cross-attention (`shares_image_projection`), the result
        serves both.
        """
        return tuple(
            layer.cross_attention_of(role).project(image_embeds) for layer in self._layers()
        )

    def no_image(self, num_images: int) -> ImageKeysValues:
        """Return what stands for images that nobody sees, in place of `project_image`'s.

        Attention over no token gives zero before its output projection, and so does this.
        """
        bert = self.config.bert
        shape = (num_images, bert.num_heads, 1, bert.width // bert.num_heads)
        nothing = self._embeddings("decoder").words.weight.new_zeros(shape)
        return tuple(KeysValues(nothing, nothing) for _ in self.layers)

    @property
    def shares_image_projection(self) -> bool:
        """Whether `project_image` gives encoder and decoder the same keys and values."""
        return self.config.sharing in (Sharing.ALL, Sharing.ALL_BUT_SELF_ATTENTION)

    def begin(self, image: ImageKeysValues, *, num_captions: int, max_length: int) -> DecoderState:
        """Return the state before the first token, with room for `max_length` tokens a caption.

        `image` comes from `project_image(..., "decoder")`; R is B * `num_captions`. Raises
        ValueError for more tokens than the model has positions.
        """
        if max_length > self.config.bert.max_positions:
            raise ValueError(
                f"max_length is {max_length}; the model has "
                f"{self.config.bert.max_positions} positions"
            )
        like = image[0].keys
        batch, heads, _, head_width = like.shape
        shape = (batch * num_captions, heads, max_length, head_width)
        text = tuple(KeysValues(like.new_zeros(shape), like.new_zeros(shape)) for _ in image)
        return DecoderState(image, text, length=0)

    def step(self, token_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read the next t tokens (R, t) of every caption; return (R, V) logits of what follows.

        The first call reads the prompt, [DEC] first. Raises ValueError when `state` is full or has
        another number of rows.
        """
        rows, max_length = state.text[0].keys.shape[0], state.text[0].keys.shape[2]
        length = state.length + token_ids.shape[1]
        if length > max_length:
            raise ValueError(f"a caption of {length} tokens; begin() made room for {max_length}")
        if len(token_ids) != rows:
            raise ValueError(f"{len(token_ids)} rows of tokens for a state of {rows} captions")
        positions = torch.arange(state.length, length, device=token_ids.device)
        logits = self.decode_at(token_ids, positions, state.image, state.text, state.places)
        return logits, replace(state, length=length)

    def decode_at(
        self,
        token_ids: Tensor,
        positions: Tensor,
        image: ImageKeysValues,
        text: ImageKeysValues,
        places: Places | None = None,
    ) -> Tensor:
        """Write tokens (R, t) at `positions` (t,) into `text`; return (R, V) logits of the next.

        This is `step` without Python state: no shape depends on how far the captions are, so that
        it can be compiled or captured once. For inference: `text` is changed in place.
        """
        columns = torch.arange(text[0].keys.shape[2], device=positions.device)
        mask = columns <= positions[:, None]  # (t, max_length)
        hidden = self._embeddings("decoder")(token_ids, positions)
        for layer, context, past in zip(self._layers(), image, text, strict=True):
            fresh = layer.self_attention_of("decoder").project(hidden)
            past.keys.index_copy_(2, positions, fresh.keys.to(past.keys.dtype))
            past.values.index_copy_(2, positions, fresh.values.to(past.values.dtype))
            hidden = layer(hidden, "decoder", past, mask, context, places)
        return self.predict(hidden[:, -1:])[:, 0]

    def _layers(self) -> Iterator[MedLayer]:
        return cast(Iterator[MedLayer], iter(self.layers))

    def _embeddings(self, role: Role) -> TextEmbeddings:
        embeddings = of_role(self.embeddings, role)
        assert isinstance(embeddings, TextEmbeddings)
        return embeddings


def starting_with(token_id: int, token_ids: Tensor) -> Tensor:
    """Return a copy of `token_ids` (R, T) whose first token is `token_id`: [ENC] or [DEC]."""
    replaced = token_ids.clone()
    replaced[:, 0] = token_id
    return replaced


def _columns(text_is_real: Tensor) -> Tensor:
    """Return (R, 1, 1, T): every row may attend to all real columns."""
    if text_is_real.dtype != torch.bool:  # attention would add a mask of 0 and 1 to its scores
        raise ValueError(f"text_is_real is {text_is_real.dtype}; pass attention_mask.bool()")
    return text_is_real[:, None, None, :]
