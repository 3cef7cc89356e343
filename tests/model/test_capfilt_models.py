"""The two models of CapFilt: what they hold, how they are asked, in which precision."""

from dataclasses import replace

import pytest
import torch
from med_golden import HIDDEN, LOGITS, LOSS, NO_DROPOUT, forward_golden, reference_model

from model.capfilt import MedCaptioner, MedFilter, caption_loss, load_part
from model.losses import token_losses
from model.med import starting_with
from model.vision import TINY_VIT, resize_positions

ENC, DEC, CLS, SEP = 129, 128, 2, 3


@pytest.fixture(scope="module")
def golden():
    """The recorded forward passes, and the inputs of their six rows."""
    return forward_golden()


@pytest.fixture(scope="module")
def model():
    """The reference's weights; only read by these tests."""
    return reference_model().eval()


@pytest.fixture(scope="module")
def image(model, golden):
    with torch.no_grad():
        return model.text.project_image(golden["image_embeds"], "decoder")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- a part of a pretrained model --------------------------------------------------------------


def test_captioner_and_filter_hold_their_part_of_a_pretrained_model(model):
    state = model.state_dict()
    captioner = MedCaptioner(TINY_VIT, NO_DROPOUT)
    scorer = MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16)
    assert not [name for name in captioner.state_dict() if ".encoder." in name and "self_" in name]
    assert not [name for name in scorer.state_dict() if ".decoder." in name or ".head." in name]
    for part in (captioner, scorer):
        load_part(part, state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())


def test_a_captioner_for_larger_images_starts_from_resized_positions(model):
    larger = replace(TINY_VIT, image_size=48)
    captioner = MedCaptioner(larger, NO_DROPOUT)
    load_part(captioner, model.state_dict())
    positions = model.image_encoder.positions
    expected = resize_positions(positions, side=6, align_corners=False)
    assert torch.equal(captioner.image_encoder.positions, expected)
    state = captioner.begin(torch.zeros(1, 3, 48, 48), max_length=4)
    assert state.image[0].keys.shape[2] == larger.num_tokens == 37


def test_starting_from_weights_that_lack_a_part_tells_which(model):
    state = model.state_dict()
    del state["itm_head.bias"]
    with pytest.raises(ValueError, match=r"lack itm_head\.bias"):
        load_part(MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16), state)


# --- captioner ---------------------------------------------------------------------------------


def test_the_captioner_is_not_asked_for_its_prompt(golden):
    captioner = MedCaptioner(TINY_VIT, NO_DROPOUT).eval()
    ids = torch.tensor([[CLS, 10, 11, 12, 20, 21, SEP, 0]])
    is_real = ids != 0
    loss = captioner(golden["pixels"][:1], ids, is_real, prompt_length=4)
    image = captioner.project_image(captioner.image_encoder(golden["pixels"][:1]))
    logits = captioner.text.decode(starting_with(DEC, ids), is_real, image)
    # [DEC] a picture of: the third word is the last of the prompt, so 20, 21 and [SEP] are asked.
    asked = token_losses(logits[:, 3:6], ids[:, 4:7], smoothing=0.1)
    assert loss.item() == pytest.approx(asked.mean().item(), rel=1e-5)


def test_the_captioners_loss_equals_the_decoders_of_the_reference(golden, model):
    captioner = MedCaptioner(TINY_VIT, NO_DROPOUT)
    load_part(captioner, model.state_dict())
    loss = captioner(golden["pixels"], golden["token_ids"], golden["is_real"], prompt_length=1)
    assert loss.item() == pytest.approx(golden["decoder_loss"].item(), **LOSS)


def test_the_captioner_begins_with_as_many_captions_as_asked(golden, model):
    captioner = MedCaptioner(TINY_VIT, NO_DROPOUT).eval()
    load_part(captioner, model.state_dict())
    state = captioner.begin(golden["pixels"], num_captions=3, max_length=12)
    logits, state = captioner.step(torch.tensor([[DEC, 10, 11]]).expand(18, 3), state)
    assert state.length == 3
    expected = golden["gen_greedy_scores"][:, 0].repeat_interleave(3, dim=0)
    allowed = expected.isfinite()
    torch.testing.assert_close(logits[allowed], expected[allowed], **LOGITS)


def test_08_the_captioning_loss_is_the_smoothed_cross_entropy_written_out(model, golden, image):
    ids, is_real = golden["decoder_input_ids"], golden["is_real"]
    log_p = model.text.decode(ids, is_real, image).log_softmax(dim=2)[:, :-1]
    of_target = log_p.gather(2, ids[:, 1:, None])[..., 0]
    each = -0.9 * of_target - 0.1 * log_p.mean(dim=2)
    loss = caption_loss(model.text, image, ids, is_real)
    assert loss.item() == pytest.approx(each[is_real[:, 1:]].mean().item(), rel=1e-5)


# --- filter ------------------------------------------------------------------------------------


def test_the_filter_scores_with_enc_and_with_cls_only_when_asked(model, golden):  # D23
    embeds, ids, is_real = golden["image_embeds"], golden["token_ids"], golden["is_real"]
    assert (ids[:, 0] == CLS).all()
    probability = model.match_probability(embeds, ids, is_real)
    expected = golden["itm_logits_pos"].softmax(dim=1)[:, 1]
    torch.testing.assert_close(probability, expected, **LOGITS)
    as_released = model.match_probability(embeds, ids, is_real, keeps_cls=True)
    assert (as_released - expected).abs().max() > 1e-3
    with_enc = model.match_probability(embeds, starting_with(ENC, ids), is_real, keeps_cls=True)
    assert torch.equal(with_enc, probability)


def test_similarity_is_the_cosine_of_each_text_with_its_own_image(model, golden):
    embeds, ids, is_real = golden["image_embeds"], golden["token_ids"], golden["is_real"]
    cosine = golden["image_feat"] @ golden["text_feat"].t()
    own = model.similarity(embeds, ids, is_real)
    torch.testing.assert_close(own, cosine.diagonal(), **HIDDEN)
    two_each = model.similarity(embeds[:3], ids, is_real)  # rows 0, 1 belong to image 0, ...
    expected = cosine[torch.arange(3).repeat_interleave(2), torch.arange(6)]
    torch.testing.assert_close(two_each, expected, **HIDDEN)


def test_scores_of_a_text_do_not_depend_on_its_neighbours(model, golden):
    embeds, ids, is_real = golden["image_embeds"], golden["token_ids"], golden["is_real"]
    together = model.match_probability(embeds[:2], ids, is_real)  # three texts an image
    for row in range(6):
        image = row // 3
        alone = model.match_probability(
            embeds[image : image + 1], ids[row : row + 1], is_real[row : row + 1]
        )
        torch.testing.assert_close(alone[0], together[row], **HIDDEN)


# --- precision ---------------------------------------------------------------------------------


def test_scores_under_bfloat16_autocast_come_in_float32_near_the_full_ones(model, golden):
    arguments = golden["image_embeds"], golden["token_ids"], golden["is_real"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.match_probability(*arguments), model.similarity(*arguments)
    full = model.match_probability(*arguments), model.similarity(*arguments)
    for low, high in zip(half, full, strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, high, atol=0.05, rtol=0)


def test_a_captioner_cast_to_bfloat16_decodes(model, golden):
    captioner = MedCaptioner(TINY_VIT, NO_DROPOUT).eval()
    load_part(captioner, model.state_dict())
    full = captioner.begin(golden["pixels"], max_length=4)
    expected, _ = captioner.step(torch.full((6, 1), DEC), full)
    captioner.bfloat16()
    state = captioner.begin(golden["pixels"].bfloat16(), max_length=4)
    logits, _ = captioner.step(torch.full((6, 1), DEC), state)
    assert logits.dtype == torch.bfloat16
    assert torch.cosine_similarity(logits.float(), expected).min() > 0.99
