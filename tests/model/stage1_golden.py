"""The reference's tiny stage 1, its recorded numbers, and the tolerances its own noise allows."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from model.names.blip2 import LAVIS_ALIASES, LAVIS_UNUSED, STAGE1_LAVIS
from model.names.rename import to_ours
from model.qformer import QFormerConfig
from model.stage1 import Stage1, Stage1Config

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
A, B, E = GOLDEN / "A_qformer_tiny", GOLDEN / "B_stage1", GOLDEN / "E_optim"
HIDDEN = {"atol": 2e-5, "rtol": 1e-4}
LOGITS = {"atol": 1e-4, "rtol": 1e-4}

CONFIG = Stage1Config(
    qformer=QFormerConfig(
        vocab_size=129,
        width=64,
        num_layers=4,
        num_heads=4,
        ffn_width=128,
        max_positions=32,
        dropout=0.0,
        num_queries=8,
        image_width=48,
    ),
    joint_width=16,
    caption_start_id=128,
)


def npz(path):
    """Every array of a file as a tensor."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def reference_weights():
    """The reference's parameters under our names, without its aliases, constants and stub ViT."""
    theirs = load_file(A / "model.safetensors")
    skipped = {*LAVIS_ALIASES, "Qformer.bert.embeddings.position_ids", "visual_encoder.dummy"}
    assert "Qformer.bert.embeddings.position_ids" in LAVIS_UNUSED[0].replace("\\", "")
    return {to_ours(name, STAGE1_LAVIS): theirs[name] for name in theirs.keys() - skipped}


def reference_model(config=CONFIG, dtype=torch.float32):
    """The reference's model; its image encoder hands on the recorded ViT output."""
    model = Stage1(config, nn.Identity())
    model.load_state_dict(reference_weights())
    return model.to(dtype)


def batch(arrays, image_ids=None):
    """What `Stage1.forward` takes, of a file with image_raw, input_ids and attention_mask."""
    ids = torch.full((len(arrays["input_ids"]),), -1) if image_ids is None else image_ids
    return arrays["image_raw"], arrays["input_ids"], arrays["attention_mask"].bool(), ids


def noise(name):
    """Measured error of the reference's own float32 for one recorded array."""
    return json.loads((A / "fp32_noise.json").read_text())[name]["max_abs_err_fp32_vs_fp64"]
