"""The text-only baseline: what a captioner comes to without its image, whichever image it was."""

import json
from dataclasses import replace

import pytest
import torch
from training_jobs import CPU

from jobs.training.blip import CaptionerObjective, MedObjective
from jobs.training.blip2 import Stage1Objective, Stage2Objective
from jobs.training.gates import PATIENCE, Gates
from jobs.training.objectives import Batch, Moment, to_device
from jobs.training.probes import probe
from jobs.training.stage2 import _byte_tokenizer
from jobs.training.texts import tokenizer_from_vocabulary, vocabulary_of_words
from model.llm_text import LlmTokenizer
from model.presets import BLIP2_PRESETS, MED_PRESETS, LlmPreset

TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "heart", "bus")]
WORDS = tokenizer_from_vocabulary(json.dumps(vocabulary_of_words(TEXTS, 256)).encode())
NUM_STEPS = 60


def med():
    model = MED_PRESETS["tiny"].with_vocabulary(WORDS.num_plain)
    model = replace(
        model, objectives=replace(model.objectives, queue_size=len(TEXTS))
    ).pretraining()
    return MedObjective(model, WORDS, max_tokens=8, batch_size=len(TEXTS), alarm_after=0)


def captioner():
    model = MED_PRESETS["tiny"].with_vocabulary(WORDS.num_plain).captioner()
    return CaptionerObjective(model, WORDS, max_tokens=12, alarm_after=0)


def stage1():
    model = BLIP2_PRESETS["tiny"].with_vocabulary(WORDS.num_plain).build_stage1()
    return Stage1Objective(model, WORDS, max_tokens=8, contrast_size=len(TEXTS), alarm_after=0)


def stage2():
    preset = BLIP2_PRESETS["tiny"]
    return of_llm(preset, preset.llm.build())


def stage2_of_a_t5():
    preset, t5 = BLIP2_PRESETS["tiny"], BLIP2_PRESETS["blip2-flan-t5-xl"].llm.config
    sizes = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
    small = type(t5)(**(t5.to_dict() | sizes | {"num_heads": 4, "num_decoder_layers": 1}))
    return of_llm(preset, LlmPreset(name=None, dtype=torch.float32, config=small).build())


def of_llm(preset, llm):
    tokenizer = LlmTokenizer.for_llm(_byte_tokenizer(), llm.model.config)
    model = preset.build_stage2(llm)
    return Stage2Objective(model, tokenizer, max_tokens=24, seed=0, alarm_after=0)


ALL = pytest.mark.parametrize("make", [med, captioner, stage1, stage2, stage2_of_a_t5])


def batch_of(objective, seed):
    """Return captions, each with an image of noise of its own."""
    torch.manual_seed(seed)
    text = to_device(objective.read_texts(TEXTS, TEXTS, 0), CPU)
    size = (len(TEXTS), 3, 32, 32)
    return Batch(torch.randn(size), torch.arange(len(TEXTS)), text, TEXTS)


@ALL
def test_without_its_image_the_loss_is_that_of_any_other_image(make):
    torch.manual_seed(0)
    objective = make()
    one, other = (probe(objective, [batch_of(objective, seed)]) for seed in (1, 2))
    assert one["lm_blind"] == other["lm_blind"]
    assert one["lm_blank"] == other["lm_blank"]
    assert one["lm_seen"] != other["lm_seen"]


def alarms_of(objective, batch):
    """Return the alarms about captions that as many records raise as it takes."""
    gates = Gates(objective.expected)
    for _ in range(PATIENCE):
        found = gates.judge(1, probe(objective, [batch]))
    return [alarm.name for alarm in found if alarm.name == "lm_blind"]


@pytest.mark.parametrize("make", [captioner, stage1, stage2])
def test_a_captioner_that_uses_its_image_raises_no_alarm(make):
    torch.manual_seed(0)
    objective = make()
    batch = batch_of(objective, 1)
    if make is stage2:  # random weights are no language model: this one learns to be
        objective.model.llm.requires_grad_(True)
    learning = [p for p in objective.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=4e-3)
    for _ in range(NUM_STEPS):
        objective.losses(objective.model, batch, Moment(0.0, 0, 1))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    found = probe(objective, [batch])
    assert found["lm_seen"] < min(found["lm_blind"], found["lm_blank"]) - 0.1
    assert alarms_of(objective, batch) == []


def deaf_decoder(objective):
    """Let cross-attention say the same of every image, and of none."""
    for layer in objective.model.text.layers:
        torch.nn.init.zeros_(layer.cross_attention_of("decoder").output.weight)


def deaf_queries(objective):
    """Let the Q-Former see nothing, as with an image encoder whose weights were not loaded."""
    for layer in objective.model.qformer.layers:
        if layer.cross_attention is not None:
            torch.nn.init.zeros_(layer.cross_attention.output.weight)


@pytest.mark.parametrize(
    ("make", "deafen"),
    [
        (med, deaf_decoder),
        (captioner, deaf_decoder),
        (stage1, deaf_queries),
        (stage2, deaf_queries),
        (stage2_of_a_t5, deaf_queries),
    ],
)
def test_a_captioner_that_ignores_its_image_raises_the_alarm(make, deafen):
    torch.manual_seed(0)
    objective = make()
    deafen(objective)
    assert alarms_of(objective, batch_of(objective, 1)) == ["lm_blind"]


def test_without_queries_a_token_is_told_by_those_before_it_alone():
    torch.manual_seed(0)
    model = stage1().model.eval()
    ids, is_real = WORDS.encode(TEXTS, 8)
    alone = model.qformer.decode(ids, is_real, None)
    cut = [model.qformer.decode(ids[:, :n], is_real[:, :n], None)[:, -1] for n in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(cut, dim=1), alone[:, :3], atol=1e-5, rtol=1e-5)
