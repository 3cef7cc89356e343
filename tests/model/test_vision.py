from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2VisionConfig, CLIPVisionConfig
from transformers.models.blip.configuration_blip import BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel

from model.names.rename import to_theirs
from model.names.vision import (
    BLIP_VIT,
    BLIP_VIT_TRANSFORMERS,
    CLIP_VIT,
    CLIP_VIT_TRANSFORMERS,
    EVA_VIT,
    EVA_VIT_TRANSFORMERS,
    prefixed,
    vision_to_ours,
    vision_to_theirs,
)
from model.vision import (
    BLIP_VIT_B,
    BLIP_VIT_L,
    CLIP_VIT_L,
    EVA_CLIP_VIT_G,
    TINY_VIT,
    FrozenImageEncoder,
    ImageEncoder,
    VisionConfig,
    resize_positions,
)

TINY = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 4, "mlp_width": 96}
TINY_EVA = replace(EVA_CLIP_VIT_G, num_layers=2, **TINY)
TINY_CLIP = replace(CLIP_VIT_L, num_layers=2, **TINY)


def randomised(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight at random, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return encoder.eval()


def pixels(num_images: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(7))


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "millions"),
    [(BLIP_VIT_B, 85.8), (BLIP_VIT_L, 303.3), (EVA_CLIP_VIT_G, 985.9), (CLIP_VIT_L, 290.6)],
)
def test_towers_have_the_papers_parameter_counts(config, millions):
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("config", "image_size", "num_tokens"),
    [
        (EVA_CLIP_VIT_G, 224, 257),
        (EVA_CLIP_VIT_G, 364, 677),
        (CLIP_VIT_L, 490, 1226),
        (BLIP_VIT_B, 224, 197),
        (BLIP_VIT_B, 384, 577),
        (BLIP_VIT_B, 480, 901),
    ],
)
def test_an_image_becomes_as_many_tokens_as_in_the_papers(config, image_size, num_tokens):
    assert replace(config, image_size=image_size).num_tokens == num_tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 33}, "not a multiple of patch_size"),
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"drop_path": 1.0}, "probability below 1"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_VIT, **wrong)


# --- equal to transformers ---------------------------------------------------------------------


def huggingface_tower(config: VisionConfig, *, extra_layers: int = 0) -> nn.Module:
    sizes = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers + extra_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
    }
    if config.has_norm_before:
        return randomised(CLIPVisionModel(CLIPVisionConfig(**sizes)))
    if config.has_norm_after:
        return randomised(BlipVisionModel(BlipVisionConfig(**sizes)))
    return randomised(Blip2VisionModel(Blip2VisionConfig(**sizes, qkv_bias=True)))


CASES = [
    pytest.param(TINY_VIT, BLIP_VIT_TRANSFORMERS, 0, id="blip"),
    pytest.param(TINY_EVA, EVA_VIT_TRANSFORMERS, 0, id="eva"),
    pytest.param(TINY_CLIP, CLIP_VIT_TRANSFORMERS, 1, id="clip, last block cut"),
]


@pytest.mark.parametrize(("config", "format", "extra_layers"), CASES)
def test_a_tower_loaded_from_transformers_gives_its_features(config, format, extra_layers):
    theirs = huggingface_tower(config, extra_layers=extra_layers)
    ours = ImageEncoder(config)
    ours.load_state_dict(vision_to_ours(theirs.state_dict(), format, num_layers=config.num_layers))
    with torch.no_grad():
        seen = theirs(pixels(), output_hidden_states=True)
    expected = seen.last_hidden_state if config.has_norm_after else None
    if expected is None:
        expected = seen.hidden_states[-1 - extra_layers]
    torch.testing.assert_close(ours.eval()(pixels()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "format", "extra_layers"), CASES)
def test_transformers_loaded_from_our_tower_gives_our_features(config, format, extra_layers):
    ours = randomised(ImageEncoder(config), seed=3)
    theirs = huggingface_tower(config, extra_layers=extra_layers)
    loaded = theirs.load_state_dict(vision_to_theirs(ours.state_dict(), format), strict=False)
    assert loaded.unexpected_keys == []
    not_of_the_tower = {name for name in loaded.missing_keys if "post_layernorm" in name}
    cut_off = {name for name in loaded.missing_keys if f"layers.{config.num_layers}." in name}
    assert set(loaded.missing_keys) == not_of_the_tower | cut_off
    with torch.no_grad():
        seen = theirs(pixels(), output_hidden_states=True)
    got = seen.last_hidden_state if config.has_norm_after else seen.hidden_states[-1 - extra_layers]
    torch.testing.assert_close(got, ours(pixels()), atol=1e-5, rtol=1e-5)


def test_a_key_bias_that_transformers_trained_changes_nothing():
    theirs = huggingface_tower(TINY_EVA)
    assert theirs.encoder.layers[0].self_attn.qkv.bias[48:96].abs().min() > 0
    state = vision_to_ours(theirs.state_dict(), EVA_VIT_TRANSFORMERS)
    back = vision_to_theirs(state, EVA_VIT_TRANSFORMERS)
    assert back["encoder.layers.0.self_attn.qkv.bias"][48:96].abs().max() == 0


@pytest.mark.parametrize(
    ("config", "format"),
    [
        (TINY_VIT, BLIP_VIT),
        (TINY_VIT, BLIP_VIT_TRANSFORMERS),
        (TINY_EVA, EVA_VIT),
        (TINY_EVA, EVA_VIT_TRANSFORMERS),
        (TINY_CLIP, CLIP_VIT),
        (TINY_CLIP, CLIP_VIT_TRANSFORMERS),
    ],
)
def test_weights_survive_a_round_trip_through_every_format(config, format):
    state = randomised(ImageEncoder(config)).state_dict()
    back = vision_to_ours(vision_to_theirs(state, format), format)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_lavis_and_clip_names_are_those_of_their_files():
    eva = vision_to_theirs(ImageEncoder(TINY_EVA).state_dict(), EVA_VIT)
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.1.attn.q_bias"} < eva.keys()
    assert "blocks.0.attn.qkv.bias" not in eva
    clip = vision_to_theirs(ImageEncoder(TINY_CLIP).state_dict(), CLIP_VIT)
    assert clip["class_embedding"].shape == (48,)
    assert clip["positional_embedding"].shape == (17, 48)
    assert clip["transformer.resblocks.1.attn.in_proj_weight"].shape == (144, 48)
    deeper = prefixed(EVA_VIT.table, ours="image_encoder.", theirs="visual_encoder.")
    assert to_theirs("image_encoder.cls_token", deeper) == "visual_encoder.cls_token"


def test_the_last_block_and_the_classifier_of_a_file_are_left_out():
    full = ImageEncoder(replace(TINY_EVA, num_layers=3)).state_dict()
    file = vision_to_theirs(full, EVA_VIT) | {
        "head.weight": torch.zeros(2),
        "norm.bias": full["cls_token"],
    }
    kept = vision_to_ours(file, EVA_VIT, num_layers=2)
    assert kept.keys() == ImageEncoder(TINY_EVA).state_dict().keys()


def test_a_name_that_a_format_does_not_know_is_an_error_that_tells_it():
    with pytest.raises(ValueError, match=r"no tensor named blocks\.0\.gamma"):
        vision_to_ours({"blocks.0.gamma": torch.zeros(1)}, BLIP_VIT)
    with pytest.raises(ValueError, match=r"no place for norm_before\.bias"):
        vision_to_theirs({"norm_before.bias": torch.zeros(1)}, BLIP_VIT)


# --- what each tower does differently ----------------------------------------------------------


def test_eva_has_no_key_bias_and_blip_has_one():
    assert "layers.0.attention.qkv.bias" not in dict(ImageEncoder(TINY_EVA).named_parameters())
    assert "layers.0.attention.qkv.bias" in dict(ImageEncoder(TINY_VIT).named_parameters())


@pytest.mark.parametrize("align_corners", [False, True])
def test_positions_are_resized_bicubically_with_the_class_token_kept(align_corners):
    positions = torch.randn(1, 17, 5)
    grid = positions[0, 1:].reshape(4, 4, 5)
    expected = F.interpolate(
        grid.permute(2, 0, 1)[None], size=(6, 6), mode="bicubic", align_corners=align_corners
    )[0].permute(1, 2, 0)
    resized = resize_positions(positions, side=6, align_corners=align_corners)
    assert resized.shape == (1, 37, 5)
    assert torch.equal(resized[0, 0], positions[0, 0])
    torch.testing.assert_close(resized[0, 1:].reshape(6, 6, 5), expected)


def test_aligned_corners_keep_the_corner_positions_and_the_other_rule_does_not():
    positions = torch.randn(1, 17, 5)
    aligned = resize_positions(positions, side=7, align_corners=True)
    torch.testing.assert_close(aligned[0, [1, 49]], positions[0, [1, 16]])
    other = resize_positions(positions, side=7, align_corners=False)
    assert not torch.allclose(other[0, [1, 49]], positions[0, [1, 16]], atol=1e-3)


def test_resized_positions_equal_those_of_transformers():
    theirs = huggingface_tower(TINY_VIT)
    ours = ImageEncoder(TINY_VIT)
    ours.load_state_dict(vision_to_ours(theirs.state_dict(), BLIP_VIT_TRANSFORMERS))
    ours.eval().change_resolution(48)
    with torch.no_grad():
        expected = theirs(pixels(size=48), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours(pixels(size=48)), expected, atol=1e-5, rtol=1e-5)


def test_another_resolution_is_an_error_until_it_is_asked_for():
    encoder = ImageEncoder(TINY_VIT)
    with pytest.raises(ValueError, match="change_resolution"):
        encoder(pixels(size=48))
    encoder.change_resolution(48)
    assert encoder(pixels(size=48)).shape == (2, 37, 48)
    assert encoder.positions.requires_grad


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="square"):
        resize_positions(torch.zeros(1, 16, 4), side=5, align_corners=False)


def test_a_new_tower_tells_two_images_apart():
    features = ImageEncoder(TINY_VIT).eval()(pixels())
    assert (features[0] - features[1]).abs().max() > 1e-3


# --- training ----------------------------------------------------------------------------------


def test_stochastic_depth_grows_linearly_and_acts_in_training_alone():
    encoder = ImageEncoder(replace(TINY_VIT, num_layers=5, drop_path=0.4))
    rates = [layer.drop_path for layer in encoder.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    encoder.eval()
    assert torch.equal(encoder(pixels()), encoder(pixels()))
    encoder.train()
    assert not torch.equal(encoder(pixels()), encoder(pixels()))


def test_stochastic_depth_keeps_the_expected_branch():
    block = ImageEncoder(replace(TINY_VIT, num_layers=1, drop_path=0.0)).layers[0].train()
    block.drop_path = 0.25
    dropped = block._drop(torch.ones(20_000, 1, 1))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)


def test_checkpointed_activations_leave_features_and_gradients_as_they_were():
    plain = randomised(ImageEncoder(TINY_VIT)).train()
    saving = ImageEncoder(replace(TINY_VIT, checkpoint_activations=True)).train()
    saving.load_state_dict(plain.state_dict())
    for encoder in (plain, saving):
        encoder(pixels()).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_under_autocast_eva_keeps_a_float32_residual_and_clip_does_not():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ImageEncoder(TINY_EVA)(pixels()).dtype == torch.float32
        assert ImageEncoder(TINY_CLIP)(pixels()).dtype == torch.bfloat16


# --- frozen means frozen -----------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.head = nn.Linear(48, 1)


def test_a_frozen_encoder_survives_train_and_never_gets_a_gradient():
    model = Around(FrozenImageEncoder(replace(TINY_EVA, drop_path=0.5)))
    model.train()
    assert not any(module.training for module in model.image_encoder.modules())
    model.requires_grad_(True)  # even who turns them all on trains the head alone
    images = pixels().requires_grad_()
    model.head(model.image_encoder(images)).sum().backward()
    assert images.grad is None
    assert all(parameter.grad is None for parameter in model.image_encoder.parameters())
    assert model.head.weight.grad is not None


def test_a_frozen_encoder_starts_without_requiring_gradients():
    assert not any(p.requires_grad for p in FrozenImageEncoder(TINY_EVA).parameters())


def test_frozen_and_trainable_encoders_load_each_other():
    trainable = randomised(ImageEncoder(TINY_EVA))
    frozen = FrozenImageEncoder(TINY_EVA)
    frozen.load_state_dict(trainable.state_dict())
    assert torch.equal(frozen(pixels()), trainable(pixels()))
    ImageEncoder(TINY_EVA).load_state_dict(frozen.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_casts_convolutions_and_linear_layers_alone(dtype):
    encoder = FrozenImageEncoder(TINY_EVA, dtype=dtype)
    kept = {name for name, p in encoder.named_parameters() if p.dtype == torch.float32}
    cast = {name for name, p in encoder.named_parameters() if p.dtype == dtype}
    assert kept | cast == dict(encoder.named_parameters()).keys()
    assert {"cls_token", "positions", "layers.1.attention.query_bias"} < kept
    assert all("norm" in n or "_bias" in n or n in ("cls_token", "positions") for n in kept)
    assert {"patches.weight", "patches.bias", "layers.0.mlp.up.bias"} < cast


@pytest.mark.parametrize("move", ["to", "half", "bfloat16", "double"])
def test_casting_the_model_around_it_leaves_a_frozen_encoders_dtypes_alone(move):
    model = Around(FrozenImageEncoder(TINY_EVA, dtype=torch.bfloat16))
    before = {name: p.dtype for name, p in model.image_encoder.named_parameters()}
    if move == "to":
        model.to(torch.float16)
    else:
        getattr(model, move)()
    assert {name: p.dtype for name, p in model.image_encoder.named_parameters()} == before
    assert model.head.weight.dtype != torch.float32


def test_a_frozen_encoder_can_be_built_on_the_meta_device_and_made_real():
    with torch.device("meta"):
        encoder = FrozenImageEncoder(TINY_EVA, dtype=torch.bfloat16)
    encoder.to_empty(device="cpu")
    weights = randomised(ImageEncoder(TINY_EVA)).state_dict()
    encoder.load_state_dict(weights)
    assert encoder.patches.weight.dtype == torch.bfloat16
    assert torch.isfinite(encoder(pixels())).all()


@pytest.mark.parametrize("config", [TINY_EVA, TINY_CLIP])
def test_half_precision_features_come_in_the_callers_dtype_and_near_float32(config):
    full = randomised(ImageEncoder(config))
    half = FrozenImageEncoder(config, dtype=torch.bfloat16)
    half.load_state_dict(full.state_dict())
    features = half(pixels())
    assert features.dtype == torch.float32
    assert half(pixels().bfloat16()).dtype == torch.bfloat16
    cosine = F.cosine_similarity(features.flatten(1), full(pixels()).flatten(1))
    assert cosine.min() > 0.999


def test_half_precision_ignores_the_autocast_around_it():
    encoder = FrozenImageEncoder(TINY_CLIP, dtype=torch.bfloat16)
    outside = encoder(pixels())
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(encoder(pixels()), outside)


def test_a_storage_type_that_is_no_float_is_refused():
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        FrozenImageEncoder(TINY_VIT, dtype=torch.int8)


def test_compiled_features_equal_plain_ones():
    encoder = randomised(FrozenImageEncoder(TINY_EVA))
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels()), encoder(pixels()), atol=1e-6, rtol=1e-5)
