"""Folders of small random models, written by transformers, with real tokenizers beside them."""

import json

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *("a", "picture", "of", "cat", "dog", "red", "blue", "box", "on", "the"),
    *("tree", "car", "big", "small", "##s", "##y", ",", "'", "-", "two"),
]
IMAGE = 32


def bert_vocabulary(size=100):
    """Special tokens, some English, and filler words up to `size`."""
    words = [*SPECIAL, *WORDS]
    return words + [f"w{number}" for number in range(size - len(words))]


def save_bert_tokenizer(folder, size=100, extra=()):
    """Write the tokenizer of a BLIP folder; `extra` tokens come behind the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("tokenizer*.json"):
        old.unlink()
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary(size)))
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def blip_config(vocabulary=100, **text):
    """A small BlipConfig; transformers' own defaults for heads and eps are not BLIP's."""
    stack = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BlipConfig(
        text_config=stack
        | {
            "vocab_size": vocabulary + 2,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
            "max_position_embeddings": 64,
            "bos_token_id": vocabulary,
            "sep_token_id": 3,
            "eos_token_id": 3,
            "pad_token_id": 0,
            "initializer_range": 0.2,
        }
        | text,
        vision_config=stack
        | {"intermediate_size": 64, "image_size": IMAGE, "patch_size": 8, "layer_norm_eps": 1e-6},
        image_text_hidden_size=16,
    )


def randomised(model, std=0.2, seed=0):
    """Give every parameter a value that matters: transformers' own start is nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + noise / 4 if is_scale else noise)
    return model.eval()


def save_captioner(folder, seed=0, **options):
    """Write a folder of BlipForConditionalGeneration; returns the model."""
    model = randomised(BlipForConditionalGeneration(blip_config(**options)), seed=seed)
    model.save_pretrained(folder)
    save_bert_tokenizer(folder)
    return model


def save_filter(folder, seed=1, **options):
    """Write a folder of BlipForImageTextRetrieval; returns the model."""
    model = randomised(BlipForImageTextRetrieval(blip_config(**options)), seed=seed)
    model.save_pretrained(folder)
    save_bert_tokenizer(folder, extra=("[DEC]", "[ENC]"))
    return model


def save_clip(folder, seed=2):
    """Write a folder of CLIPModel; returns the model."""
    letters = [chr(code) for code in range(97, 123)]
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stack = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    text = stack | {
        "vocab_size": len(tokens),
        "max_position_embeddings": 40,
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
        "pad_token_id": len(tokens) - 1,
    }
    vision = stack | {"image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = randomised(CLIPModel(config), seed=seed)
    model.save_pretrained(folder)
    return model
