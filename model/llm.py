"""The frozen language model of BLIP-2's stage 2: any causal LM of transformers, or a T5.

The parts that differ between decoder-only and encoder-decoder models end here: how a prefix of
embeddings goes in, and which logits come out.

Dims: B batch, Q query tokens, T text tokens, S suffix tokens, W width of the LLM, V vocabulary.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import GELUActivation, NewGELUActivation


@dataclass(frozen=True, kw_only=True, slots=True)
class LlmDecodingConfig:
    """How the LLM continues a prompt; the defaults are BLIP-2's for captions (its released code).

    Lengths count new tokens, never the queries or the prompt. Nothing else chooses tokens: what a
    model's own generation_config says is not used.
    """

    num_beams: int = 5  # 1 without top_p is greedy
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    top_p: float | None = None  # sample from the nucleus, by torch's global generator; None: search
    temperature: float = 1.0  # of sampling

    def __post_init__(self) -> None:
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens == 0:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, max_new_tokens {self.max_new_tokens}"
            )


# Short answers to questions (BLIP-2, Sec. 4.1); the released code has length_penalty 0 for OPT.
ANSWERS = LlmDecodingConfig(max_new_tokens=10, length_penalty=-1.0)


class FrozenLlm(nn.Module):
    """A language model that reads embeddings and never learns (BLIP-2, Sec. 3.3).

    Its parameters do not require gradients, whatever is done to the model around it: gradients pass
    through it to what it reads. With `has_dropout` its own dropout is active while the model around
    it trains, as in the released code; without, it stays in evaluation mode, so that targets are
    deterministic.

    In half precision it computes in that precision, with autocast off; the embeddings that it reads
    are cast. In float32 it follows the autocast around it.
    """

    model: Any  # a PreTrainedModel that generates; transformers has no one type for that

    def __init__(self, model: PreTrainedModel, *, has_dropout: bool = True) -> None:
        """Take over `model`: freeze it, forget how it would generate, let a T5 use the exact GELU.

        Raises ValueError for a model that is neither a causal LM nor a T5-like encoder-decoder.
        """
        super().__init__()
        self.model = model
        if self.model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no language modelling head; load it through "
                f"AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        # What a model's own generation_config says would fill in what `generate` leaves open.
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self.has_dropout = has_dropout
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        _use_exact_gelu(model)
        self.requires_grad_(False)
        self.train(self.training)

    @property
    def width(self) -> int:
        """Return W, the width of the embeddings that the model reads."""
        return self._words.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the word embeddings, in which a prefix is read."""
        return self._words.weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Follow the mode of the model around it, or stay in evaluation mode."""
        return super().train(mode and self.has_dropout)

    @torch.no_grad()
    def untie_head(self) -> None:
        """Give the head weights of its own, at first those of the word embeddings.

        transformers builds every T5 with tied ones, but FlanT5's differ.
        """
        head = self.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)

    def untie_head_of(self, weights: Mapping[str, Tensor]) -> None:
        """Call `untie_head` if `weights`, under this module's names, have a head of its own.

        That is, one that differs from the word embeddings; transformers too goes by the weights.
        """
        head = self.model.get_output_embeddings().weight
        tied = [name for name, p in self.named_parameters(remove_duplicate=False) if p is head]
        found = [weights[name] for name in tied if name in weights]
        if any(not torch.equal(found[0], other) for other in found[1:]):
            self.untie_head()

    def causal_logits(
        self,
        prefix: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        *,
        sees_prefix: bool = True,
    ) -> Tensor:
        """Return what a decoder-only model predicts for each text token: (B, T, V) logits.

        It reads `prefix` (B, Q, W) and then `token_ids` (B, T), padded on the right; logit t is
        computed from the prefix and the tokens before t. Logits of the prefix are never computed.
        Without `sees_prefix` the attention mask hides the prefix from the text: logits are those of
        the text alone, but for logit 0, which no token precedes and which then means nothing.
        """
        with self._precision(prefix):
            embeds, mask = self._behind(prefix, token_ids, text_is_real, sees_prefix)
            logits: Tensor = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                logits_to_keep=token_ids.shape[1] + 1,
                use_cache=False,
            ).logits
        return logits[:, :-1]

    def suffix_logits(
        self,
        prefix: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        suffix_ids: Tensor,
        suffix_is_real: Tensor,
        *,
        sees_prefix: bool = True,
    ) -> Tensor:
        """Return what an encoder-decoder predicts for each suffix token: (B, S, V) logits.

        Its encoder reads `prefix` (B, Q, W) and `token_ids` (B, T), its decoder the suffix (B, S)
        behind the start token. Without `sees_prefix` the attention mask hides the prefix from both.
        """
        start = torch.full_like(suffix_ids[:, :1], self.model.config.decoder_start_token_id)
        with self._precision(prefix):
            embeds, mask = self._behind(prefix, token_ids, text_is_real, sees_prefix)
            logits: Tensor = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                decoder_input_ids=torch.cat((start, suffix_ids[:, :-1]), dim=1),
                decoder_attention_mask=suffix_is_real.long(),
                use_cache=False,
            ).logits
        return logits

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        token_ids: Tensor,
        text_is_real: Tensor,
        config: LlmDecodingConfig,
        *,
        stop_id: int,
        pad_id: int,
    ) -> Tensor:
        """Return the tokens that continue `prefix` (B, Q, W) and a left-padded prompt (B, T).

        (B, at most max_new_tokens) int64: new tokens alone, `stop_id` last where it came, then
        `pad_id`.
        """
        options: dict[str, Any] = {"num_beams": config.num_beams, "do_sample": False}
        if config.top_p is not None:
            options = {"num_beams": 1, "do_sample": True, "top_p": config.top_p, "top_k": 0}
            options["temperature"] = config.temperature
        if options["num_beams"] > 1:
            options |= {"length_penalty": config.length_penalty, "early_stopping": False}
        if self.is_encoder_decoder:
            options["decoder_start_token_id"] = self.model.config.decoder_start_token_id
        with self._precision(prefix):
            embeds, mask = self._behind(prefix, token_ids, text_is_real)
            ids: Tensor = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=config.max_new_tokens,
                min_new_tokens=config.min_new_tokens,
                repetition_penalty=config.repetition_penalty,
                eos_token_id=stop_id,
                pad_token_id=pad_id,
                **options,
            )
        return ids[:, 1:] if self.is_encoder_decoder else ids

    @property
    def _words(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def _behind(
        self, prefix: Tensor, token_ids: Tensor, text_is_real: Tensor, sees_prefix: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, Q+T, W) and attention mask (B, Q+T) of the prefix and a text."""
        words = self._words(token_ids)
        size = prefix.shape[:2]
        seen = torch.full(size, int(sees_prefix), dtype=torch.long, device=prefix.device)
        mask = torch.cat((seen, text_is_real.long()), dim=1)
        return torch.cat((prefix.to(words.dtype), words), dim=1), mask

    def _precision(self, prefix: Tensor) -> contextlib.AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(prefix.device.type, enabled=False)


def load_llm(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    has_dropout: bool = True,
) -> FrozenLlm:
    """Return a language model by its folder or its name on the hub, frozen, in `dtype`.

    The paper stores OPT in float16 and FlanT5 in bfloat16, in which alone it is stable.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    model = _class_for(config).from_pretrained(name, config=config, dtype=dtype, revision=revision)
    if Path(name).is_dir():
        model.config.name_or_path = Path(name).name  # exports carry it: no path of this machine
    return FrozenLlm(model, has_dropout=has_dropout)


def build_llm(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    has_dropout: bool = True,
) -> FrozenLlm:
    """Return a language model with random weights; under `torch.device("meta")`, without any."""
    make: Any = _class_for(config).from_config
    return FrozenLlm(make(config, dtype=dtype), has_dropout=has_dropout)


def _class_for(
    config: PreTrainedConfig,
) -> type[AutoModelForSeq2SeqLM] | type[AutoModelForCausalLM]:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _use_exact_gelu(model: PreTrainedModel) -> None:
    """Replace FlanT5's tanh approximation: BLIP-2 was trained with the exact GELU.

    The config is changed too, so that what is saved is what was computed.
    """
    if getattr(model.config, "dense_act_fn", None) != "gelu_new":
        return
    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = GELUActivation()
        config: Any = getattr(module, "config", None)
        if config is not None:
            config.dense_act_fn = "gelu"
