import re
from dataclasses import replace

import pytest
import torch
from med_golden import NO_DROPOUT, OBJECTIVES, D, reference_model
from safetensors.torch import load_file
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from model.capfilt import MedCaptioner, MedFilter
from model.med import starting_with
from model.med_pretraining import FILTER_FINE_TUNING, MedPretraining
from model.names.blip import (
    CAPTIONER_BLIP,
    CAPTIONER_TRANSFORMERS,
    FILTER_BLIP,
    FILTER_TRAINING_BLIP,
    FILTER_TRANSFORMERS,
    PRETRAINING_BLIP,
    med_to_ours,
    med_to_theirs,
)
from model.vision import TINY_VIT

ENC, DEC = 129, 128
FINE_TUNING = replace(FILTER_FINE_TUNING, joint_width=16, queue_size=24)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def randomised(model, seed=0):
    """Draw every weight at random, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = re.search("norm", name, re.IGNORECASE) and name.endswith("weight")
            parameter.copy_(0.1 * noise + bool(is_norm))
    return model.eval()


def their_config():
    bert = NO_DROPOUT.bert
    text = {
        "vocab_size": bert.vocab_size,
        "hidden_size": bert.width,
        "encoder_hidden_size": NO_DROPOUT.image_width,
        "intermediate_size": bert.ffn_width,
        "num_hidden_layers": bert.num_layers,
        "num_attention_heads": bert.num_heads,
        "max_position_embeddings": bert.max_positions,
        "bos_token_id": DEC,
        "label_smoothing": 0.1,
    }
    vision = {
        "hidden_size": TINY_VIT.width,
        "intermediate_size": TINY_VIT.mlp_width,
        "num_hidden_layers": TINY_VIT.num_layers,
        "num_attention_heads": TINY_VIT.num_heads,
        "image_size": TINY_VIT.image_size,
        "patch_size": TINY_VIT.patch_size,
        "layer_norm_eps": TINY_VIT.norm_eps,
    }
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 120, (3, 9), generator=generator)
    ids[:, 0] = 2
    is_real = torch.arange(9) < torch.tensor([[9], [5], [7]])
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return pixels, ids.masked_fill(~is_real, 0), is_real


def their_caption_logits(model, inputs):
    pixels, ids, is_real = inputs
    labels = starting_with(DEC, ids).masked_fill(~is_real, -100)
    output = model(
        pixel_values=pixels,
        input_ids=starting_with(DEC, ids),
        attention_mask=is_real.long(),
        labels=labels,
    )
    return output.logits, output.loss


def our_caption_logits(model, inputs):
    pixels, ids, is_real = inputs
    image = model.project_image(model.image_encoder(pixels))
    logits = model.text.decode(starting_with(DEC, ids), is_real, image)
    return logits, model(pixels, ids, is_real, prompt_length=1)


def their_scores(model, inputs):
    pixels, ids, is_real = inputs
    arguments = {"pixel_values": pixels, "attention_mask": is_real.long()}
    matched = model(input_ids=starting_with(ENC, ids), **arguments).itm_score
    as_released = model(input_ids=ids, **arguments).itm_score
    cosine = model(input_ids=ids, use_itm_head=False, **arguments).itm_score
    return matched, as_released, cosine.diagonal()


def our_scores(model, inputs):
    pixels, ids, is_real = inputs
    embeds = model.encode_image(pixels)
    image = model.text.project_image(embeds, "encoder")
    return (
        model.match_logits(image, ids, is_real),
        model.match_logits(image, ids, is_real, keeps_cls=True),
        model.similarity(embeds, ids, is_real),
    )


# --- transformers ------------------------------------------------------------------------------


def test_a_captioner_loaded_from_transformers_gives_its_logits_and_loss(inputs):
    theirs = randomised(BlipForConditionalGeneration(their_config()))
    ours = MedCaptioner(TINY_VIT, NO_DROPOUT).eval()
    ours.load_state_dict(med_to_ours(theirs.state_dict(), CAPTIONER_TRANSFORMERS))
    for got, expected in zip(
        our_caption_logits(ours, inputs), their_caption_logits(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_transformers_loaded_from_our_captioner_gives_our_logits_and_loss(inputs):
    ours = randomised(MedCaptioner(TINY_VIT, NO_DROPOUT), seed=1)
    theirs = BlipForConditionalGeneration(their_config()).eval()
    theirs.load_state_dict(med_to_theirs(ours.state_dict(), CAPTIONER_TRANSFORMERS))
    for got, expected in zip(
        their_caption_logits(theirs, inputs), our_caption_logits(ours, inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_filter_loaded_from_transformers_gives_its_scores(inputs):
    theirs = randomised(BlipForImageTextRetrieval(their_config()))
    ours = MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16).eval()
    ours.load_state_dict(med_to_ours(theirs.state_dict(), FILTER_TRANSFORMERS))
    for got, expected in zip(our_scores(ours, inputs), their_scores(theirs, inputs), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_transformers_loaded_from_our_filter_gives_our_scores(inputs):
    ours = randomised(MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16), seed=1)
    theirs = BlipForImageTextRetrieval(their_config()).eval()
    theirs.load_state_dict(med_to_theirs(ours.state_dict(), FILTER_TRANSFORMERS))
    for got, expected in zip(their_scores(theirs, inputs), our_scores(ours, inputs), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_filter_in_training_is_written_without_what_only_training_needs():
    ours = MedPretraining(TINY_VIT, NO_DROPOUT, FINE_TUNING)
    theirs = BlipForImageTextRetrieval(their_config())
    theirs.load_state_dict(med_to_theirs(ours.state_dict(), FILTER_TRANSFORMERS))


# --- BLIP's repository -------------------------------------------------------------------------


def test_a_pretraining_file_of_blip_survives_a_round_trip_whole():
    file = load_file(D / "model.safetensors")
    back = med_to_theirs(med_to_ours(file, PRETRAINING_BLIP), PRETRAINING_BLIP)
    constants = {name for name in file if name.endswith("position_ids")}
    # The recorded file holds a shared tensor once; BLIP's own, and ours, under each of its names.
    assert file.keys() - constants <= back.keys()
    assert all(torch.equal(back[name], file[name]) for name in file.keys() - constants)


def test_a_shared_weight_is_written_under_each_of_its_names():
    back = med_to_theirs(reference_model().state_dict(), PRETRAINING_BLIP)
    one = "encoder.layer.1.crossattention.self.key.weight"
    assert torch.equal(back[f"text_encoder.{one}"], back[f"text_decoder.bert.{one}"])
    words = back["text_encoder.embeddings.word_embeddings.weight"]
    for alias in (
        "text_decoder.bert.embeddings.word_embeddings.weight",
        "text_decoder.cls.predictions.decoder.weight",
    ):
        assert torch.equal(back[alias], words)
        assert back[alias].data_ptr() != words.data_ptr()  # safetensors refuses shared memory
    assert "text_decoder.cls.predictions.decoder.bias" in back
    self_attention = "encoder.layer.1.attention.self.key.weight"
    one, other = back[f"text_encoder.{self_attention}"], back[f"text_decoder.bert.{self_attention}"]
    assert not torch.equal(one, other)


def test_weights_that_should_be_shared_and_differ_are_an_error_that_names_both():
    back = med_to_theirs(reference_model().state_dict(), PRETRAINING_BLIP)
    changed = "text_decoder.bert.encoder.layer.0.output.dense.bias"
    back[changed] = back[changed] + 1
    with pytest.raises(ValueError, match=rf"text_encoder.* and {re.escape(changed)} differ"):
        med_to_ours(back, PRETRAINING_BLIP)


@pytest.mark.parametrize(
    ("build", "format"),
    [
        (lambda: MedCaptioner(TINY_VIT, NO_DROPOUT), CAPTIONER_BLIP),
        (lambda: MedCaptioner(TINY_VIT, NO_DROPOUT), CAPTIONER_TRANSFORMERS),
        (lambda: MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16), FILTER_BLIP),
        (lambda: MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16), FILTER_TRANSFORMERS),
        (
            lambda: MedPretraining(TINY_VIT, NO_DROPOUT, FINE_TUNING),
            FILTER_TRAINING_BLIP,
        ),
    ],
)
def test_weights_survive_a_round_trip_through_every_format(build, format):
    state = randomised(build()).state_dict()
    back = med_to_ours(med_to_theirs(state, format), format)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_pretraining_writes_all_but_the_ids_that_blip_does_not_keep():
    state = MedPretraining(TINY_VIT, NO_DROPOUT, OBJECTIVES).state_dict()
    back = med_to_ours(med_to_theirs(state, PRETRAINING_BLIP), PRETRAINING_BLIP)
    assert state.keys() - back.keys() == {"queue.image_ids"}


def test_a_fine_tuned_filter_of_blip_is_read_without_its_queue_and_momentum():
    training = MedPretraining(TINY_VIT, NO_DROPOUT, FINE_TUNING)
    file = med_to_theirs(training.state_dict(), FILTER_TRAINING_BLIP)
    assert {"ptr_queue", "idx_queue", "temp", "visual_encoder_m.cls_token"} < file.keys()
    ours = MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16)
    ours.load_state_dict(med_to_ours(file, FILTER_BLIP))


def test_a_name_that_a_format_does_not_know_is_an_error_that_tells_it():
    with pytest.raises(ValueError, match=r"no tensor named merge_layer\.weight"):
        med_to_ours({"merge_layer.weight": torch.zeros(1)}, FILTER_BLIP)
    with pytest.raises(ValueError, match=r"no place for text\.head\.bias"):
        med_to_theirs({"text.head.bias": torch.zeros(1)}, FILTER_BLIP)
