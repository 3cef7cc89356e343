"""Every preset has the papers' sizes and is built on the meta device in seconds."""

import time

import pytest
import torch

from model.presets import BLIP2_PRESETS, MED_PRESETS


def count(module, *, learning=False):
    parameters = module.parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not learning) / 1e6


def timed(build):
    start = time.process_time()
    with torch.device("meta"):
        model = build()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    return model, time.process_time() - start


# What learns and what there is, in millions, per the paper's Table 2; towers lack their last block.
@pytest.mark.parametrize(
    ("name", "learning", "total"),
    [
        ("blip2-opt-2.7b", 107.1, 3745),
        ("blip2-opt-6.7b", 108.3, 7753),
        ("blip2-flan-t5-xl", 106.7, 3942),
        ("blip2-flan-t5-xxl", 108.3, 12229),
        ("blip2-vit-l-opt-2.7b", 103.6, 3046),
        ("blip2-vit-l-flan-t5-xl", 103.2, 3243),
    ],
)
def test_stage_2_has_the_papers_sizes_and_is_built_in_seconds(name, learning, total):
    model, seconds = timed(BLIP2_PRESETS[name].build_stage2)
    assert round(count(model, learning=True), 1) == learning
    assert count(model) == pytest.approx(total, rel=1e-3)
    assert seconds < 20


@pytest.mark.parametrize(
    ("name", "learning"), [("blip2-opt-2.7b", 186.7), ("blip2-vit-l-opt-2.7b", 183.2)]
)
def test_stage_1_has_the_papers_sizes_and_is_built_in_seconds(name, learning):
    model, seconds = timed(BLIP2_PRESETS[name].build_stage1)
    assert round(count(model, learning=True), 1) == learning
    assert seconds < 20


@pytest.mark.parametrize(("name", "captioner"), [("base", 224.0), ("large", 446.0)])
def test_med_has_the_papers_sizes_and_is_built_in_seconds(name, captioner):
    preset = MED_PRESETS[name]
    _, seconds = timed(preset.pretraining)
    assert seconds < 20
    model, _ = timed(preset.captioner)
    assert count(model) == pytest.approx(captioner, rel=5e-3)
    assert model.image_encoder.config.image_size == 384
    assert timed(preset.filter)[0].image_encoder.config.image_size == 384


def test_d13_the_papers_hyper_parameters_stand_beside_the_sizes():
    preset = BLIP2_PRESETS["blip2-flan-t5-xl"]
    first, second = preset.stage1_training, preset.stage2_training
    assert (first.num_steps, second.num_steps) == (250_000, 80_000)
    assert (first.global_batch_size, second.global_batch_size) == (1680, 1520)
    assert first.betas == second.betas == (0.9, 0.98)
    assert second.floor_rate == 5e-5
    assert first.warmup_steps == second.warmup_steps == 2000
    assert BLIP2_PRESETS["blip2-vit-l-opt-2.7b"].stage1_training.global_batch_size == 2320
    large = MED_PRESETS["large"].training
    assert (large.peak_rate, large.global_batch_size, large.num_epochs) == (2e-4, 2400, 20)


def test_half_precision_is_the_papers():
    assert BLIP2_PRESETS["blip2-opt-6.7b"].llm.dtype == torch.float16
    assert BLIP2_PRESETS["blip2-flan-t5-xxl"].llm.dtype == torch.bfloat16
    assert BLIP2_PRESETS["blip2-flan-t5-xxl"].llm.config.dense_act_fn == "gelu"


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        BLIP2_PRESETS["mine"] = BLIP2_PRESETS["tiny"]
    with pytest.raises(AttributeError):
        MED_PRESETS["base"].vision = None


@pytest.mark.parametrize("size", [128, 1000])
def test_tiny_models_learn_on_any_vocabulary(size):
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.randint(4, size, (2, 8))
    real = torch.ones_like(ids, dtype=torch.bool)
    stage1 = BLIP2_PRESETS["tiny"].with_vocabulary(size).build_stage1()
    loss = stage1(pixels, ids, real, torch.arange(2)).total
    captioner = MED_PRESETS["tiny"].with_vocabulary(size).captioner()
    (loss + captioner(pixels, ids, real)).backward()
    assert loss.isfinite()
    assert stage1.qformer.word_embeddings.num_embeddings == size + 1
    assert captioner.text.config.match_start_id == size + 1


def test_the_tiny_stage_2_starts_from_the_tiny_stage_1():
    preset = BLIP2_PRESETS["tiny"]
    stage2 = preset.build_stage2()
    stage2.load_stage1(preset.build_stage1().state_dict())
    assert stage2.soft_prompt(torch.randn(2, 3, 32, 32)).shape == (2, 8, 64)
