"""Stage 2's model: stage 1's weights, a frozen language model and its tokenizer."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.checkpoint import fingerprint_tensors
from jobs.errors import UserError
from jobs.training.blip2 import Stage2Objective
from jobs.training.job import TrainingJob
from model.llm import FrozenLlm, load_llm
from model.llm_text import LlmTokenizer
from model.presets import Blip2Preset
from model.vision import ImageEncoder
from model.weight_files import load_strictly

_TOWER = "image_encoder."
_BYTE_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # OPT's, at OPT's ids


def build_stage2(
    job: TrainingJob,
    preset: Blip2Preset,
    stage1: Mapping[str, Tensor],
    *,
    image_dtype: torch.dtype,
    llm_dtype: torch.dtype | None,
    max_tokens: int,
) -> tuple[Stage2Objective, dict[str, str], dict[str, str]]:
    """Return the objective, the origins of its weights, and fingerprints of what is frozen.

    `llm_dtype` None stores the language model as the preset says. Raises UserError.
    """
    llm, tokenizer = _language_model(job, preset, llm_dtype)
    if job.config.checkpoints_activations:
        llm.model.gradient_checkpointing_enable()
    model = preset.build_stage2(llm, image_dtype=image_dtype)
    model.load_stage1(stage1)
    tower = {n.removeprefix(_TOWER): t for n, t in stage1.items() if n.startswith(_TOWER)}
    load_strictly(cast(ImageEncoder, model.image_encoder), tower, source="stage 1's image encoder")
    try:
        objective = Stage2Objective(
            model,
            tokenizer,
            max_tokens=max_tokens,
            seed=job.seed,
            alarm_after=job.config.watch.alarm_after_steps,
        )
    except ValueError as error:
        raise UserError(f"training.stage2.llm = {job.section.llm!r}: {error}") from error
    frozen = {
        "image_encoder": fingerprint_tensors(model.image_encoder.state_dict().items()),
        "llm": fingerprint_tensors(llm.state_dict().items()),
    }
    return objective, {}, frozen


def _language_model(
    job: TrainingJob, preset: Blip2Preset, dtype: torch.dtype | None
) -> tuple[FrozenLlm, LlmTokenizer]:
    hide_progress: Any = transformers.utils.logging.disable_progress_bar  # which has no types
    hide_progress()
    section = job.section
    name = section.llm or preset.llm.name
    revision = job.config.revisions.get(name or "")
    if name is None:
        llm = preset.llm.build(has_dropout=section.has_llm_dropout)
        tokenizer = _byte_tokenizer()
    else:
        try:
            llm = load_llm(
                name,
                dtype=dtype or preset.llm.dtype,
                revision=revision,
                has_dropout=section.has_llm_dropout,
            )
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except OSError as error:
            raise UserError(
                f"training.stage2.llm = {name!r} can neither be found on this machine nor "
                f"downloaded ({str(error).splitlines()[0]}); name a folder or a model on the hub"
            ) from error
    try:
        return llm, LlmTokenizer.for_llm(tokenizer, llm.model.config)
    except ValueError as error:
        raise UserError(f"the tokenizer of {name or 'the preset'}: {error}") from error


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of single bytes, for a language model that has none of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_BYTE_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = make(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    return made
