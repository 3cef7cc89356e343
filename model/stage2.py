"""BLIP-2's second stage: what the queries saw becomes a soft prompt for a frozen language model.

Image encoder and LLM stay frozen; a LayerNorm, the Q-Former and one linear layer learn (BLIP-2,
Sec. 3.3).
Dims: B batch, Q query tokens, T text tokens, P image tokens, I image width, D Q-Former width,
W width of the LLM, V vocabulary.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.llm import FrozenLlm, LlmDecodingConfig
from model.llm_text import CausalText, LlmTokenizer, PrefixText, prompt_text
from model.losses import label_smoothed, token_losses
from model.qformer import QFormer, QFormerConfig
from model.vision import LnVision

# What stage 1 learned that stage 2 has no use for: patterns of `Stage1`'s names, with the reason.
STAGE1_ONLY = {
    r"qformer\.(word|position)_embeddings\..*": "the Q-Former reads no text here",
    r"qformer\.layers\.\d+\.text_ffn\..*": "the Q-Former reads no text here",
    r"qformer\.language_head\..*": "the LLM writes the text",
    r"(vision_proj|text_proj|itm_head)\..*": "a head of another objective",
    r"temperature": "of another objective",
    r"image_encoder\..*": "the image encoder is frozen and has its own weights",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Config:
    """Sizes of stage 2; the defaults are the paper's with a ViT-g."""

    qformer: QFormerConfig = field(default_factory=lambda: QFormerConfig(has_text=False))

    def __post_init__(self) -> None:
        if self.qformer.has_text:
            raise ValueError("stage 2 has no use for the Q-Former's text side: has_text=False")


@dataclass(frozen=True, slots=True)
class Stage2Loss:
    """`loss` is a float32 scalar; `logits` (B, T, V) predict the tokens of the text or suffix."""

    loss: Tensor
    logits: Tensor


class Stage2(nn.Module):
    """Image encoder, its LayerNorm, the queries' half of the Q-Former, a projection, an LLM.

    `image_encoder` maps pixels to (B, P, I) states and is frozen by its own means
    (`FrozenImageEncoder`); the LLM is frozen by `FrozenLlm`. What learns is float32, whatever the
    LLM is: half-precision masters lose small updates, and float16 ones diverge.
    """

    def __init__(self, config: Stage2Config, image_encoder: nn.Module, llm: FrozenLlm) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = image_encoder
        self.ln_vision = LnVision(config.qformer.image_width)
        self.qformer = QFormer(config.qformer)
        self.projection = nn.Linear(config.qformer.width, llm.width)
        self.llm = llm

    def load_stage1(self, weights: Mapping[str, Tensor]) -> None:
        """Start from what stage 1 learned, under the names of `Stage1`.

        Everything that learns here must be there, but for the projection, which starts at random:
        a query FFN that is missing would stay random in silence. Raises ValueError that lists what
        is missing, and what is neither used nor known to have no use (`STAGE1_ONLY`).
        """
        wanted = {
            name
            for name in self.state_dict()
            if not name.startswith(("image_encoder.", "llm.", "projection."))
        }
        missing = sorted(wanted - weights.keys())
        strange = sorted(
            name
            for name in weights.keys() - wanted
            if not any(re.fullmatch(pattern, name) for pattern in STAGE1_ONLY)
        )
        if missing or strange:
            raise ValueError(f"stage 1's weights lack {missing} and have unknown {strange}")
        self.load_state_dict({name: weights[name] for name in wanted}, strict=False)

    def soft_prompt(self, pixels: Tensor) -> Tensor:
        """Return what the LLM reads of images, (B, Q, W), for pixels as the image encoder takes."""
        image = self.ln_vision(self.image_encoder(pixels))  # (B, P, I)
        queries = self.qformer.encode_image(self.qformer.project_image(image))
        prompt: Tensor = self.projection(queries.embeds)
        return prompt

    def forward(self, pixels: Tensor, text: CausalText | PrefixText) -> Stage2Loss:
        """Return the loss of writing texts behind their images' soft prompts (Sec. 3.3).

        A decoder-only LLM takes `CausalText`, an encoder-decoder `PrefixText`, on the device of
        `pixels`; ValueError for the other. The loss is the mean over all targets of the batch,
        without smoothing.
        """
        logits = self.logits(self.soft_prompt(pixels), text)
        return Stage2Loss(label_smoothed(logits, text.targets, smoothing=0.0), logits)

    def logits(
        self, soft_prompt: Tensor, text: CausalText | PrefixText, *, sees_prompt: bool = True
    ) -> Tensor:
        """Return (B, T, V) logits of the tokens of a text, or of a suffix, behind (B, Q, W).

        Without `sees_prompt` the soft prompt is masked from the LLM's attention: what it would
        write of no image. The first token of a `CausalText` then has no logits that mean anything.
        """
        if isinstance(text, PrefixText) != self.llm.is_encoder_decoder:
            kind = "PrefixText" if self.llm.is_encoder_decoder else "CausalText"
            raise ValueError(f"this LLM learns from {kind}, not from {type(text).__name__}")
        if isinstance(text, CausalText):
            ids, is_real = text.text.token_ids, text.text.is_real
            return self.llm.causal_logits(soft_prompt, ids, is_real, sees_prefix=sees_prompt)
        prefix, suffix = text.prefix, text.suffix
        return self.llm.suffix_logits(
            soft_prompt,
            prefix.token_ids,
            prefix.is_real,
            suffix.token_ids,
            suffix.is_real,
            sees_prefix=sees_prompt,
        )

    @torch.no_grad()
    def log_likelihoods(self, pixels: Tensor, text: CausalText | PrefixText) -> Tensor:
        """Return how likely each text is for its image, (B,) float32: for ranking candidates.

        The sum of the log-probabilities of its targets, padding never counted, so that scores of
        different batches compare.
        """
        logits = self.logits(self.soft_prompt(pixels), text)
        return -token_losses(logits, text.targets).sum(dim=1)

    @torch.no_grad()
    def generate(
        self,
        pixels: Tensor,
        prompts: list[str],
        tokenizer: LlmTokenizer,
        config: LlmDecodingConfig | None = None,
    ) -> list[str]:
        """Return a text for each image, continuing its prompt, "" for none (BLIP-2, Sec. 4)."""
        text = prompt_text(tokenizer, prompts, is_encoder_decoder=self.llm.is_encoder_decoder)
        ids = self.llm.generate(
            self.soft_prompt(pixels),
            text.token_ids.to(pixels.device),
            text.is_real.to(pixels.device),
            config or LlmDecodingConfig(),
            stop_id=tokenizer.stop_id,
            pad_id=tokenizer.pad_id,
        )
        return tokenizer.decode(ids)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the weights that learn, by name: what a checkpoint has to hold."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
