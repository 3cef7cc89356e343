"""The reference's tiny MED, its recorded numbers, and the tolerances its own noise allows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from model.capfilt import load_part
from model.losses import Negatives
from model.med import TINY_MED
from model.med_pretraining import MedObjectives, MedPretraining, MedStep
from model.momentum import NO_IMAGE
from model.names.blip import PRETRAINING_BLIP, med_to_ours
from model.vision import TINY_VIT

D = Path(__file__).parents[1] / "data" / "golden" / "D_blip_med"
HIDDEN = {"atol": 2e-5, "rtol": 1e-4}
LOGITS = {"atol": 1e-4, "rtol": 1e-4}
LOSS = {"abs": 2e-5, "rel": 1e-5}

NO_DROPOUT = replace(TINY_MED, bert=replace(TINY_MED.bert, dropout=0.0))
OBJECTIVES = MedObjectives(joint_width=16, queue_size=24)


def npz(name):
    """Every array of a file as a tensor."""
    with np.load(D / name) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def forward_golden():
    """The recorded forward passes, and the inputs of their six rows."""
    inputs = npz("inputs.npz")
    rows = {"token_ids": inputs["input_ids"][:6], "pixels": inputs["image"][:6]}
    return npz("forward.npz") | rows | {"is_real": inputs["attention_mask"][:6].bool()}


def steps():
    """The recorded draws, weights of soft targets and losses of three steps."""
    return json.loads((D / "info.json").read_text())["steps"]


def reference_weights():
    """The reference's state before the first step, under our names."""
    weights = med_to_ours(load_file(D / "model.safetensors"), PRETRAINING_BLIP)
    # The reference's pretraining knows no ids; nothing was enqueued yet.
    return weights | {"queue.image_ids": torch.full((1, 24), NO_IMAGE)}


def reference_model(objectives=OBJECTIVES, med=NO_DROPOUT):
    """The reference's model before the first step, or the parts that `objectives` ask for."""
    model = MedPretraining(TINY_VIT, med, objectives)
    load_part(model, reference_weights())
    return model


def batch(first=0, last=6, image_ids=None):
    """What `MedPretraining.forward` takes first: rows of the recorded inputs."""
    inputs = npz("inputs.npz")
    ids = torch.arange(first, last) if image_ids is None else image_ids
    return (
        inputs["image"][first:last],
        inputs["input_ids"][first:last],
        inputs["attention_mask"][first:last].bool(),
        ids,
    )


def recorded_negatives(step):
    """The draws of one recorded step."""
    return Negatives(
        torch.tensor(step["neg_image_for_text_idx"]), torch.tensor(step["neg_text_for_image_idx"])
    )


def run_step(model, number=0):
    """The losses of a recorded step with the recorded draws."""
    step = steps()[number]
    return model(*batch(*step["rows"]), MedStep(alpha=step["alpha"]), recorded_negatives(step))
