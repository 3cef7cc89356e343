import dataclasses

import pytest
import torch
from stage1_golden import CONFIG, HIDDEN, LOGITS, A, noise, npz, reference_model
from torch.testing import assert_close

from model.masks import Objective
from model.qformer import QFormer


@pytest.fixture(scope="module")
def golden():
    return npz(A / "data.npz")


@pytest.fixture(scope="module")
def model():
    return reference_model().eval()


@pytest.fixture(scope="module")
def qformer(model):
    return model.qformer


@pytest.fixture(scope="module")
def image(qformer, golden):
    return qformer.project_image(golden["image_embeds"])


def text(golden):
    return golden["input_ids"], golden["attention_mask"].bool()


def caption(golden):
    return golden["iv_dec_input_ids"], golden["attention_mask"].bool()


def states_after(qformer, ffn, run):
    """What each layer's FFN of this kind returns while `run` runs."""
    seen = []
    hooks = [
        getattr(layer, ffn).register_forward_hook(lambda *args: seen.append(args[2]))
        for layer in qformer.layers
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def assert_as_recorded(ours, golden, name, tolerance=HIDDEN):
    assert_close(ours, golden[name], **tolerance)
    # The tolerance has room for other kernels; most of it should not be needed.
    assert (ours - golden[name]).abs().max() < 10 * noise(name) + 1e-6


@torch.no_grad()
def test_ln_vision_equals_the_reference(model, golden):
    assert_as_recorded(model.encode_image(golden["image_raw"]), golden, "image_embeds")


@torch.no_grad()
def test_query_pass_equals_the_reference(model, qformer, image, golden):
    queries = qformer.encode_image(image)
    assert_as_recorded(queries.embeds, golden, "i_query_last_hidden")
    keys = torch.stack([layer.keys for layer in queries.layers])
    values = torch.stack([layer.values for layer in queries.layers])
    assert_as_recorded(keys, golden, "i_past_keys")
    assert_as_recorded(values, golden, "i_past_values")
    features = model.image_features(golden["image_raw"])
    assert_as_recorded(features.feats, golden, "i_image_feats")
    assert_as_recorded(features.embeds, golden, "i_query_last_hidden")


def test_query_pass_equals_the_reference_after_each_layer(qformer, image, golden):
    states = states_after(qformer, "query_ffn", lambda: qformer.encode_image(image))
    assert_close(states, golden["i_query_hidden_states"][1:], **HIDDEN)


@torch.no_grad()
def test_text_pass_equals_the_reference(model, qformer, golden):
    assert_as_recorded(qformer.encode_text(*text(golden)), golden, "ii_text_last_hidden")
    assert_as_recorded(model.text_features(*text(golden))[:, 0], golden, "ii_text_feat")


def test_text_pass_equals_the_reference_after_each_layer(qformer, golden):
    states = states_after(qformer, "text_ffn", lambda: qformer.encode_text(*text(golden)))
    assert_close(states, golden["ii_text_hidden_states"][1:], **HIDDEN)


@torch.no_grad()
def test_text_pass_may_stop_at_the_state_that_is_read(qformer, golden):
    first = qformer.encode_text(*text(golden), first_only=True)
    assert first.shape[1] == 1
    assert_close(first[:, 0], golden["ii_text_last_hidden"][:, 0], **HIDDEN)


@torch.no_grad()
def test_pair_pass_equals_the_reference(model, qformer, image, golden):
    joint = qformer.encode_jointly(Objective.ITM, *text(golden), [image])
    assert_as_recorded(joint, golden, "iii_itm_last_hidden")
    assert_close(
        qformer.encode_pair(*text(golden), [image]), golden["iii_itm_last_hidden"][:, :8], **HIDDEN
    )
    assert_as_recorded(model.match_logits(image, *text(golden)), golden, "iii_itm_logits")
    multimodal = model.multimodal_features(golden["image_raw"], *text(golden))
    assert_close(multimodal, golden["iii_itm_last_hidden"][:, :8], **HIDDEN)


def test_pair_pass_equals_the_reference_after_each_layer(qformer, image, golden):
    def run():
        qformer.encode_jointly(Objective.ITM, *text(golden), [image])

    both = [states_after(qformer, ffn, run) for ffn in ("query_ffn", "text_ffn")]
    assert_close(torch.cat(both, dim=2), golden["iii_itm_hidden_states"][1:], **HIDDEN)


@torch.no_grad()
def test_caption_pass_equals_the_reference(qformer, image, golden):
    states = qformer.decode(*caption(golden), qformer.encode_image(image).layers)
    assert_as_recorded(qformer.next_token_logits(states), golden, "iv_logits", LOGITS)


@torch.no_grad()
def test_one_pass_under_the_itg_mask_equals_the_reference(qformer, image, golden):
    joint = qformer.encode_jointly(Objective.ITG, *caption(golden), [image])
    logits = qformer.next_token_logits(joint[:, 8:])
    assert_as_recorded(logits, golden, "iv_logits_unilm_onepass", LOGITS)


@torch.no_grad()
def test_hidden_image_tokens_equal_the_reference(qformer, golden):
    seen = qformer.project_image(golden["image_embeds"], golden["v_image_atts"].bool())
    assert_as_recorded(qformer.encode_image(seen).embeds, golden, "v_query_last_hidden")


def test_rows_without_an_image_are_refused(qformer, image, golden):
    with pytest.raises(ValueError, match="the images serve 12 rows, but there are 6 texts"):
        qformer.encode_pair(*text(golden), [image.shared_by(2)])


def test_q_former_without_text_says_so(golden):
    vision_only = QFormer(dataclasses.replace(CONFIG.qformer, has_text=False))
    assert not any("text" in name or "word" in name for name in vision_only.state_dict())
    with pytest.raises(ValueError, match="built with has_text=False"):
        vision_only.encode_text(*text(golden))


def test_q_former_without_language_head_reads_but_does_not_write(image, golden):
    reader = QFormer(dataclasses.replace(CONFIG.qformer, has_language_head=False))
    assert reader.encode_pair(*text(golden), [image]).shape == (6, 8, 64)
    with pytest.raises(ValueError, match="no language head"):
        reader.next_token_logits(torch.zeros(1, 64))


@torch.no_grad()
def test_dropout_is_drawn_anew_in_training_and_off_in_evaluation(image, golden):
    noisy = QFormer(dataclasses.replace(CONFIG.qformer, dropout=0.1))
    for run in (
        lambda: noisy.encode_image(image).embeds,
        lambda: noisy.encode_text(*text(golden)),
        lambda: noisy.encode_pair(*text(golden), [image]),
        lambda: noisy.decode(*text(golden), noisy.encode_image(image).layers),
    ):
        noisy.train()
        assert not torch.equal(run(), run())
        noisy.eval()
        assert torch.equal(run(), run())
