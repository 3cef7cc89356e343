from dataclasses import replace

import pytest
import torch
from med_golden import HIDDEN, LOGITS, LOSS, NO_DROPOUT, forward_golden, npz, reference_model
from transformers.models.bert.configuration_bert import BertConfig as TheirBertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM

from model.bert import BertConfig
from model.capfilt import MedCaptioner, caption_loss
from model.losses import next_token_targets, token_losses
from model.med import (
    TINY_MED,
    Functionality,
    MedConfig,
    MedText,
    starting_with,
)
from model.med_layers import Sharing
from model.vision import BLIP_VIT_B, BLIP_VIT_L, TINY_VIT

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


def layer_outputs(text, run):
    """What the embeddings and each layer return while `run` runs."""
    seen, parts = [], [*text.embeddings.values(), *text.layers]
    hooks = [part.register_forward_hook(lambda *call: seen.append(call[2])) for part in parts]
    run()
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


# --- equal to the reference --------------------------------------------------------------------


def test_image_tokens_and_features_equal_the_reference(model, golden):
    embeds = model.encode_image(golden["pixels"])
    torch.testing.assert_close(embeds, golden["image_embeds"], **HIDDEN)
    torch.testing.assert_close(model.image_features(embeds), golden["image_feat"], **HIDDEN)


def test_the_unimodal_encoder_equals_the_reference_in_every_layer(model, golden):
    ids, is_real = golden["token_ids"], golden["is_real"]
    states = layer_outputs(model.text, lambda: model.text.encode(ids, is_real))
    torch.testing.assert_close(states, golden["text_hidden_states"], **HIDDEN)
    last = model.text.encode(ids, is_real)
    torch.testing.assert_close(last, golden["text_last_hidden"], **HIDDEN)
    torch.testing.assert_close(model.text_features(ids, is_real), golden["text_feat"], **HIDDEN)


def test_the_image_grounded_encoder_equals_the_reference_in_every_layer(model, golden, image):
    ids, is_real = starting_with(ENC, golden["token_ids"]), golden["is_real"]
    states = layer_outputs(model.text, lambda: model.text.encode_with_image(ids, is_real, image))
    torch.testing.assert_close(states, golden["multimodal_hidden_states"], **HIDDEN)
    last = model.text.encode_with_image(ids, is_real, image)
    torch.testing.assert_close(last, golden["multimodal_last_hidden"], **HIDDEN)
    logits = model.match_logits(image, golden["token_ids"], is_real)
    torch.testing.assert_close(logits, golden["itm_logits_pos"], **LOGITS)


def test_the_decoder_and_its_loss_equal_the_reference(model, golden, image):
    ids, is_real = starting_with(DEC, golden["token_ids"]), golden["is_real"]
    assert torch.equal(ids, golden["decoder_input_ids"])
    logits = model.text.decode(ids, is_real, image)
    torch.testing.assert_close(logits, golden["decoder_logits"], **LOGITS)
    loss = caption_loss(model.text, image, ids, is_real)
    assert loss.item() == pytest.approx(golden["decoder_loss"].item(), **LOSS)
    targets = next_token_targets(ids, is_real)
    each = token_losses(logits[:, :-1], targets, smoothing=0.1).sum(dim=1)
    torch.testing.assert_close(each, golden["decoder_loss_none_persample_sum"], **LOGITS)


def test_decoding_step_by_step_equals_the_references_greedy_captions(model, golden, image):
    state = model.text.begin(image, num_captions=1, max_length=12)
    ids = torch.tensor([[DEC, 10, 11]]).expand(6, 3)
    caption = ids
    for scores in golden["gen_greedy_scores"].unbind(1):
        logits, state = model.text.step(ids, state)
        allowed = scores.isfinite()  # the reference hides the end token below the minimum length
        torch.testing.assert_close(logits[allowed], scores[allowed], **LOGITS)
        ids = logits.masked_fill(~allowed, float("-inf")).argmax(dim=1, keepdim=True)
        caption = torch.cat((caption, ids), dim=1)
    assert torch.equal(caption, golden["gen_greedy_ids"])


# --- sizes and sharing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "millions"),
    [
        (Sharing.ALL, 223.7),
        (Sharing.ALL_BUT_CROSS_ATTENTION, 252.0),
        (Sharing.ALL_BUT_SELF_ATTENTION, 252.0),
        (Sharing.NONE, 360.9),
    ],
)
def test_07_sharing_variants_have_the_papers_parameter_counts(sharing, millions):
    with torch.device("meta"):
        vision = MedCaptioner(BLIP_VIT_B, MedConfig()).image_encoder
        text = MedText(MedConfig(sharing=sharing))
    count = sum(p.numel() for part in (vision, text) for p in part.parameters())
    assert round(count / 1e6, 1) == millions


def test_07_a_large_captioner_has_the_papers_parameter_count():
    with torch.device("meta"):
        captioner = MedCaptioner(BLIP_VIT_L, MedConfig(image_width=1024))
    assert round(sum(p.numel() for p in captioner.parameters()) / 1e6, 1) == 445.9


def test_the_paper_shares_all_but_self_attention():
    names = {name.split(".", 2)[-1] for name in MedText(TINY_MED).state_dict() if "layers" in name}
    roles = {tuple(name.split(".")[:2]) for name in names}
    assert roles == {
        ("self_attention", "encoder"),
        ("self_attention", "decoder"),
        ("cross_attention", "both"),
        ("ffn", "both"),
    }


@pytest.mark.parametrize("sharing", list(Sharing))
def test_a_shared_image_projection_serves_encoder_and_decoder(sharing, golden):
    text = MedText(replace(NO_DROPOUT, sharing=sharing)).eval()
    one, other = (
        text.project_image(golden["image_embeds"], role) for role in ("encoder", "decoder")
    )
    is_equal = all(torch.equal(a.keys, b.keys) for a, b in zip(one, other, strict=True))
    assert is_equal == text.shares_image_projection


@pytest.mark.parametrize("sharing", list(Sharing))
def test_every_sharing_variant_runs_in_all_three_ways(sharing, golden):
    text = MedText(replace(TINY_MED, sharing=sharing)).eval()
    ids, is_real = golden["token_ids"], golden["is_real"]
    image = {
        role: text.project_image(golden["image_embeds"], role) for role in ("encoder", "decoder")
    }
    assert text.encode(ids, is_real).shape == (6, 30, 64)
    assert text.encode_with_image(ids, is_real, image["encoder"]).shape == (6, 30, 64)
    assert text.decode(ids, is_real, image["decoder"]).shape == (6, 30, 130)


def test_encoder_and_decoder_differ_by_self_attention_alone(model, golden, image):
    text = reference_model().text.eval()
    ids, is_real = golden["token_ids"], golden["is_real"]
    encoded = text.encode_with_image(ids, is_real, image)
    for layer in text.layers:
        layer.self_attention["encoder"].load_state_dict(
            layer.self_attention["decoder"].state_dict()
        )
    # The last real position sees the whole text in a causal mask too, but earlier states differ.
    one_token = ids[:, :1], is_real[:, :1]
    same = text.predict(text.encode_with_image(*one_token, image))
    torch.testing.assert_close(same, text.decode(*one_token, image), **LOGITS)
    assert (text.encode_with_image(ids, is_real, image) - encoded).abs().max() > 0.1


def test_the_language_head_is_tied_to_the_word_embeddings(golden):
    text = MedText(NO_DROPOUT).eval()
    assert not [name for name in text.state_dict() if name.startswith("head.decoder")]
    text.embeddings["both"].words.weight[77] = 0.0
    image = text.project_image(golden["image_embeds"], "decoder")
    logits = text.decode(golden["token_ids"], golden["is_real"], image)
    assert (logits[..., 77] == text.head.bias[77]).all()


def test_a_part_that_was_not_built_is_an_error_that_says_so(golden):
    encoder = MedText(NO_DROPOUT, frozenset({Functionality.UNIMODAL_ENCODER}))
    with pytest.raises(ValueError, match="without the image-grounded decoder"):
        encoder.predict(torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="without the parts of the encoder"):
        encoder.project_image(golden["image_embeds"], "encoder")
    decoder = MedText(NO_DROPOUT, frozenset({Functionality.IMAGE_GROUNDED_DECODER}))
    with pytest.raises(ValueError, match="without the parts of the encoder"):
        decoder.encode(golden["token_ids"], golden["is_real"])


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match=r"130 entries, but \[DEC\]"):
        MedConfig(bert=BertConfig(vocab_size=130))
    with pytest.raises(ValueError, match="48 wide, but the text stack"):
        MedCaptioner(TINY_VIT, replace(TINY_MED, image_width=64))


# --- what may see what -------------------------------------------------------------------------


def test_the_unimodal_encoder_never_sees_an_image(model, golden):
    without = MedText(NO_DROPOUT, frozenset({Functionality.UNIMODAL_ENCODER})).eval()
    state = model.text.state_dict()
    without.load_state_dict({name: state[name] for name in without.state_dict()})
    ids, is_real = golden["token_ids"], golden["is_real"]
    assert torch.equal(without.encode(ids, is_real), model.text.encode(ids, is_real))


def test_a_later_token_changes_no_earlier_logits_of_the_decoder(model, golden, image):
    ids, is_real = golden["token_ids"], golden["is_real"]
    before = model.text.decode(ids, is_real, image)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 100
    after = model.text.decode(changed, is_real, image)
    assert torch.equal(after[:, :3], before[:, :3])
    assert (after[:, 3] - before[:, 3]).abs().max() > 0.1


def test_a_later_token_changes_the_first_state_of_both_encoders(model, golden, image):
    ids, is_real = golden["token_ids"], golden["is_real"]
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 100
    for encode in (
        lambda tokens: model.text.encode(tokens, is_real),
        lambda tokens: model.text.encode_with_image(tokens, is_real, image),
    ):
        assert (encode(changed)[:, 0] - encode(ids)[:, 0]).abs().max() > 0.01


def test_what_stands_on_padding_changes_nothing(model, golden, image):
    ids, is_real = golden["token_ids"], golden["is_real"]
    noisy = torch.where(is_real, ids, 55)
    assert not torch.equal(noisy, ids)
    assert torch.equal(
        model.text.encode(noisy, is_real)[is_real], model.text.encode(ids, is_real)[is_real]
    )
    one, other = (model.text.decode(tokens, is_real, image) for tokens in (noisy, ids))
    assert torch.equal(one[is_real], other[is_real])


def test_padding_a_text_further_changes_nothing(model, golden):
    ids, is_real = golden["token_ids"], golden["is_real"]
    length = int(is_real[0].sum())
    short = model.text.encode(ids[:1, :length], is_real[:1, :length])
    padded = model.text.encode(ids[:1], is_real[:1])[:, :length]
    torch.testing.assert_close(padded, short, **HIDDEN)


def test_the_first_state_alone_equals_that_of_all(model, golden, image):
    ids, is_real = golden["token_ids"], golden["is_real"]
    torch.testing.assert_close(
        model.text.encode(ids, is_real, first_only=True), model.text.encode(ids, is_real)[:, :1]
    )
    torch.testing.assert_close(
        model.text.encode_with_image(ids, is_real, image, first_only=True),
        model.text.encode_with_image(ids, is_real, image)[:, :1],
    )


def test_a_text_longer_than_the_position_table_is_an_error(model):
    ids = torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="33 tokens; the model has 32 positions"):
        model.text.encode(ids, torch.ones(1, 33, dtype=torch.bool))


def test_a_mask_of_zeros_and_ones_is_an_error_not_an_addend(model, golden, image):
    ids, mask = golden["token_ids"], golden["is_real"].float()
    for run in (model.text.encode, lambda *args: model.text.decode(*args, image)):
        with pytest.raises(ValueError, match=r"text_is_real is torch.float32; .*bool"):
            run(ids, mask)


# --- several texts of an image -----------------------------------------------------------------


def expanded(image, num_texts):
    """Copy each image's keys and values for each of its texts: what the model avoids."""
    rows = torch.arange(6).repeat_interleave(num_texts)
    return tuple(layer.rows(rows) for layer in image)


@pytest.mark.parametrize("num_texts", [1, 2, 5])
def test_texts_of_one_image_side_by_side_equal_the_expanded_computation(
    model, golden, image, num_texts
):
    generator = torch.Generator().manual_seed(num_texts)
    ids = torch.randint(4, 120, (6 * num_texts, 9), generator=generator)
    is_real = torch.arange(9) < torch.randint(2, 10, (6 * num_texts, 1), generator=generator)
    copies = expanded(image, num_texts)
    for run in (model.text.encode_with_image, model.text.decode):
        torch.testing.assert_close(run(ids, is_real, image), run(ids, is_real, copies), **HIDDEN)


def test_captions_of_one_image_decode_as_with_an_image_each(model, image):
    continuations = torch.randint(4, 120, (18, 5), generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([[DEC, 10, 11]])
    shared = model.text.begin(image, num_captions=1, max_length=8)
    _, shared = model.text.step(prompt.expand(6, 3), shared)
    shared = shared.repeated(3)  # the prompt was read once for three captions
    alone = model.text.begin(expanded(image, 3), num_captions=1, max_length=8)
    _, alone = model.text.step(prompt.expand(18, 3), alone)
    for token in continuations.split(1, dim=1):
        one, shared = model.text.step(token, shared)
        other, alone = model.text.step(token, alone)
        torch.testing.assert_close(one, other, **LOGITS)
    assert len(shared.image[0].keys) == 6


def test_steps_of_any_size_equal_one_pass(model, golden, image):
    ids = golden["token_ids"][:, :9]
    everything = model.text.decode(ids, torch.ones_like(ids, dtype=torch.bool), image)
    state = model.text.begin(image, num_captions=1, max_length=20)  # longer than needed
    position = 0
    for size in (3, 1, 4, 1):
        logits, state = model.text.step(ids[:, position : position + size], state)
        position += size
        torch.testing.assert_close(logits, everything[:, position - 1], **LOGITS)


def test_a_reordered_state_continues_the_rows_it_was_told_to(model, golden, image):
    def decode(rows):
        state = model.text.begin(image, num_captions=2, max_length=6)
        ids = torch.arange(4, 40).view(12, 3)
        _, state = model.text.step(ids[rows], state)
        return state

    rows = torch.tensor([1, 1, 2, 3, 5, 4, 7, 7, 8, 8, 11, 10])  # as beams move within an image
    token = torch.full((12, 1), 50)
    one, _ = model.text.step(token, decode(torch.arange(12)).reordered(rows))
    other, _ = model.text.step(token, decode(rows))
    torch.testing.assert_close(one, other, **LOGITS)


def test_finished_images_can_be_left_behind(model, image):
    state = model.text.begin(image, num_captions=2, max_length=6)
    ids = torch.arange(4, 40).view(12, 3)
    _, state = model.text.step(ids, state)
    token = torch.arange(60, 72)[:, None]
    some = state.for_images(torch.tensor([4, 1]))
    rows = torch.tensor([8, 9, 2, 3])
    got, _ = model.text.step(token[rows], some)
    everything, _ = model.text.step(token, state)
    torch.testing.assert_close(got, everything[rows], **LOGITS)


def test_a_full_state_and_a_wrong_number_of_rows_are_errors(model, image):
    state = model.text.begin(image, num_captions=2, max_length=3)
    with pytest.raises(ValueError, match=r"4 tokens; begin\(\) made room for 3"):
        model.text.step(torch.zeros(12, 4, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="max_length is 33"):
        model.text.begin(image, num_captions=1, max_length=33)
    with pytest.raises(ValueError, match="6 rows of tokens for a state of 12"):
        model.text.step(torch.zeros(6, 1, dtype=torch.int64), state)


def test_a_step_is_compiled_once_for_all_positions(model, image):
    compiled = torch.compile(
        model.text.decode_at, backend="aot_eager", fullgraph=True, dynamic=False
    )
    state = model.text.begin(image, num_captions=2, max_length=6)
    plain = model.text.begin(image, num_captions=2, max_length=6)
    with torch.compiler.set_stance("default"):
        for position in range(5):
            token = torch.full((12, 1), 20 + position)
            if position == 1:
                torch.compiler.set_stance("fail_on_recompile")
            at = torch.tensor([position])
            got = compiled(token, at, state.image, state.text)
            expected, plain = model.text.step(token, plain)
            torch.testing.assert_close(got, expected, **LOGITS)


# --- precision, initialisation -----------------------------------------------------------------


def test_decoding_under_bfloat16_autocast_is_near_full_precision(model, image):
    ids = torch.arange(4, 40).view(12, 3)
    full = model.text.begin(image, num_captions=2, max_length=4)
    expected, _ = model.text.step(ids, full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = model.text.project_image(npz("forward.npz")["image_embeds"], "decoder")
        state = model.text.begin(image, num_captions=2, max_length=4)
        logits, state = model.text.step(ids[:, :2], state)
        logits, state = model.text.step(ids[:, 2:], state)
    assert state.text[0].keys.dtype == torch.bfloat16
    assert torch.cosine_similarity(logits.float(), expected).min() > 0.99


def test_new_weights_are_berts():
    text = MedText(replace(TINY_MED, bert=replace(TINY_MED.bert, width=256)))
    for name, tensor in text.named_parameters():
        if "norm.weight" in name:
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name


def bert_weights(vocab_size=128):
    sizes = TINY_MED.bert
    config = TheirBertConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.ffn_width,
        max_position_embeddings=sizes.max_positions,
    )
    torch.manual_seed(0)
    return BertForMaskedLM(config).eval()


@pytest.mark.parametrize("sharing", list(Sharing))
def test_starting_from_bert_gives_berts_states(sharing):
    bert = bert_weights()
    bert.bert.embeddings.token_type_embeddings.weight.zero_()  # which MED leaves out
    text = MedText(replace(NO_DROPOUT, sharing=sharing)).eval()
    text.load_bert(bert.state_dict())
    ids = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = bert(ids, output_hidden_states=True)
    states = text.encode(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(states, expected.hidden_states[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        text.predict(states)[..., :128], expected.logits, atol=1e-5, rtol=1e-5
    )


def test_a_bert_of_old_names_is_the_same_bert():
    weights = bert_weights().state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in weights.items()
    }
    assert old.keys() != weights.keys()
    torch.manual_seed(1)
    one, other = MedText(NO_DROPOUT), MedText(NO_DROPOUT)
    other.load_state_dict(one.state_dict())
    one.load_bert(weights)
    other.load_bert(old)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_starting_from_bert_leaves_the_new_tokens_and_cross_attention_as_they_were():
    text = MedText(NO_DROPOUT)
    before = {name: tensor.clone() for name, tensor in text.state_dict().items()}
    text.load_bert(bert_weights().state_dict())
    words = text.embeddings["both"].words.weight
    assert torch.equal(words[128:], before["embeddings.both.words.weight"][128:])
    unchanged = {n for n, t in text.state_dict().items() if torch.equal(t, before[n])}
    assert {n for n in before if "cross_attention" in n} <= unchanged
    assert not any(n.endswith("query.weight") and "self_attention" in n for n in unchanged)


def test_a_bert_that_does_not_fit_is_an_error_that_names_the_tensor():
    weights = bert_weights().state_dict()
    with pytest.raises(ValueError, match="words.weight is .130, 64"):
        MedText(NO_DROPOUT).load_bert(bert_weights(vocab_size=200).state_dict())
    del weights["bert.encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"no bert\.encoder\.layer\.1\.output\.dense\.bias"):
        MedText(NO_DROPOUT).load_bert(weights)
