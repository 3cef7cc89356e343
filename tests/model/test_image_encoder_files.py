"""An image encoder alone: saved, loaded, started from; convolutions in front; half frozen."""

from dataclasses import replace

import pytest
import torch

from model.checkpoints import load_captioner, load_filter, save_captioner, save_filter
from model.image_encoder_files import load_image_encoder, save_image_encoder, start_from
from model.presets import BLIP2_PRESETS, DEMO_VIT, MED_PRESETS
from model.vision import ImageEncoder, VisionConfig
from model.weight_files import CheckpointError


def pixels(config, num_images=2):
    size = config.image_size
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def trained():
    torch.manual_seed(0)
    encoder = ImageEncoder(DEMO_VIT).eval()
    for parameter in encoder.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.05)
    return encoder


def test_a_stem_shrinks_the_picture_and_leaves_the_number_of_patches_as_it_was(trained):
    assert DEMO_VIT.num_tokens == 37
    assert trained(pixels(DEMO_VIT)).shape == (2, 37, 96)
    assert trained.patches.weight.shape == (96, 96, 1, 1)


def test_a_patch_that_the_stem_cannot_reach_is_refused():
    with pytest.raises(ValueError, match="patch_size 12 is not a multiple of 8"):
        VisionConfig(patch_size=12, image_size=48, width=96, num_heads=4, stem_widths=(8, 8, 8))


def test_what_is_saved_computes_the_same_when_loaded(trained, tmp_path):
    save_image_encoder(trained, tmp_path)
    config, weights = load_image_encoder(tmp_path)
    again = ImageEncoder(config).eval()
    assert start_from(again, weights, "here") == []
    assert torch.equal(again(pixels(config)), trained(pixels(config)))


def test_half_precision_on_disk_is_near_and_comes_back_as_float32(trained, tmp_path):
    save_image_encoder(trained, tmp_path, torch.float16)
    _, weights = load_image_encoder(tmp_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights["positions"], trained.positions.detach(), atol=1e-3, rtol=0)


def test_another_folder_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(CheckpointError, match="is not that of an image encoder alone"):
        load_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "capfilt_image_encoder", "depth": 3}')
    with pytest.raises(CheckpointError, match="depth"):
        load_image_encoder(tmp_path)


def test_a_deeper_tower_with_a_joint_bias_starts_from_it_and_says_what_is_new(trained):
    deeper = ImageEncoder(replace(DEMO_VIT, num_layers=3, has_key_bias=True, has_norm_after=True))
    new = start_from(deeper, trained.state_dict(), "here")
    assert {name.split(".")[0] for name in new} == {"layers", "norm_after"}
    assert {name.split(".")[1] for name in new if name.startswith("layers")} == {"2"}
    deeper.layers, deeper.norm_after = deeper.layers[:2], None
    torch.testing.assert_close(deeper.eval()(pixels(DEMO_VIT)), trained(pixels(DEMO_VIT)))


def test_another_resolution_resizes_the_positions(trained):
    larger = ImageEncoder(replace(DEMO_VIT, image_size=96))
    assert start_from(larger, trained.state_dict(), "here") == []
    assert larger(pixels(larger.config)).shape == (2, 145, 96)


def test_a_weight_without_a_place_is_an_error_that_names_it(trained):
    with pytest.raises(CheckpointError, match="layers.1.attention"):
        start_from(ImageEncoder(replace(DEMO_VIT, num_layers=1)), trained.state_dict(), "here")


def test_what_is_frozen_gets_no_gradient_and_what_is_behind_it_does():
    encoder = ImageEncoder(replace(DEMO_VIT, num_layers=3, has_norm_after=True))
    encoder.freeze(2)
    encoder(pixels(DEMO_VIT)).sum().backward()
    learning = {
        name.split(".")[0:2][-1] for name, p in encoder.named_parameters() if p.grad is not None
    }
    assert learning == {"2", "weight", "bias"}  # the last block, and the norm after it
    assert all(p.grad is None for p in encoder.stem.parameters())


def test_captioner_and_filter_with_a_stem_survive_their_folders(tmp_path):
    preset = MED_PRESETS["demo"]
    captioner, matcher = preset.captioner().eval(), preset.filter().eval()
    save_captioner(captioner, tmp_path / "captioner")
    save_filter(matcher, tmp_path / "filter")
    image = pixels(preset.vision)
    again = load_captioner(tmp_path / "captioner").image_encoder(image)
    assert torch.equal(again, captioner.image_encoder(image))
    assert torch.equal(
        load_filter(tmp_path / "filter").encode_image(image), matcher.encode_image(image)
    )


def test_the_demos_sizes_fit_each_other():
    stage1 = BLIP2_PRESETS["demo"].build_stage1()
    assert stage1.image_encoder.config == DEMO_VIT
    assert MED_PRESETS["demo"].pretraining().image_encoder.config.num_layers == 3
