"""A tiny stage 2 in ours and in transformers' form, and tokenizers that are trained on the spot."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from model.llm import build_llm
from model.names.rename import to_ours
from model.names.stage2 import STAGE2_TRANSFORMERS
from model.names.vision import EVA_VIT_TRANSFORMERS, vision_to_ours
from model.qformer import QFormerConfig
from model.stage2 import Stage2, Stage2Config
from model.vision import FrozenImageEncoder, VisionConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
NUM_QUERIES = 4
IMAGE_TOKEN = 60  # where transformers puts a query
VISION = VisionConfig(
    image_size=16,
    patch_size=8,
    width=24,
    num_layers=2,
    num_heads=2,
    mlp_width=48,
    has_key_bias=False,
    has_norm_after=False,
)
CONFIG = Stage2Config(
    qformer=QFormerConfig(
        has_text=False,
        width=32,
        num_layers=3,
        num_heads=4,
        ffn_width=48,
        num_queries=NUM_QUERIES,
        image_width=24,
        dropout=0.0,
    )
)


def opt_config(**options):
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    options = sizes | ids | {"dropout": 0.0, "max_position_embeddings": 64} | options
    return OPTConfig(vocab_size=320, num_attention_heads=4, **options)


def t5_config(**options):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    options = {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"} | options
    options = {"dense_act_fn": "gelu", "tie_word_embeddings": False} | options
    return T5Config(vocab_size=320, decoder_start_token_id=0, **sizes, **options)


def qwen_config():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Qwen2Config(vocab_size=320, num_attention_heads=4, num_key_value_heads=2, **sizes)


def shake(module, seed=0, std=0.3):
    """Random weights for everything, so that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_scale else noise)
    return module


def their_model(text_config, seed=0):
    """transformers' Blip2ForConditionalGeneration with random weights and our LayerNorm's eps."""
    config = Blip2Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=text_config.to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = shake(Blip2ForConditionalGeneration(config).eval(), seed)
    for layer in model.vision_model.encoder.layers:  # EVA's key has no bias
        with torch.no_grad():
            layer.self_attn.qkv.bias[24:48] = 0
    model.vision_model.post_layernorm.eps = 1e-5
    return model


def our_model(text_config, **options):
    """Stage 2 around a language model with random weights."""
    llm = build_llm(text_config, **options)
    return Stage2(CONFIG, FrozenImageEncoder(VISION), llm).eval()


def our_weights(theirs):
    """Weights of `their_model` under our names."""
    state = theirs.state_dict()
    vision = {n.removeprefix("vision_model."): t for n, t in state.items() if "vision_model" in n}
    rest = {n: t for n, t in state.items() if not n.startswith("vision_model.") or "post" in n}
    tower = vision_to_ours(vision, EVA_VIT_TRANSFORMERS)
    ours = {f"image_encoder.{name}": tensor for name, tensor in tower.items()}
    return ours | {to_ours(name, STAGE2_TRANSFORMERS): tensor for name, tensor in rest.items()}


def pixels(num_images=3):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_images, 3, 16, 16, generator=generator)


OPT_SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
WORDS = ["a", "photo", "of", "cat", "dog", "two", "red", "birds", "on", "the", "grass", "Question:"]


def gpt2_style(*, adds_bos=True, **specials):
    """A byte-level BPE with OPT's special ids: whole words of `WORDS`, single bytes otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict(OPT_SPECIALS)
    merges = []
    for symbol in alphabet:
        vocabulary[symbol] = len(vocabulary)
    for word in WORDS:
        for whole in (word, f"Ġ{word}"):
            for end in range(2, len(whole) + 1):
                if whole[:end] not in vocabulary:
                    vocabulary[whole[:end]] = len(vocabulary)
                    merges.append((whole[: end - 1], whole[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in OPT_SPECIALS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", 2)]
        )
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"} | specials
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def t5_style(**specials):
    """A unigram tokenizer with T5's special ids."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -4.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | specials
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
