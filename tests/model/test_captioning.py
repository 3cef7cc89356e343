"""Groups of images: each looked at once, captions that leave when over, and rounding that stays."""

from dataclasses import replace

import med_golden
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from model.beam_search import BeamConfig
from model.bert import BertConfig
from model.capfilt import MedCaptioner, load_part
from model.captioning import CaptionDecoder
from model.generation import (
    DecodingConfig,
    NucleusConfig,
    _draw_from_row,
    _draw_sorted,
    greedy,
    med_decoder,
)
from model.med import MedConfig
from model.vision import TINY_VIT, VisionConfig

PROMPT = [128, 10, 11]
END = 70
WAYS = {
    "greedy": (DecodingConfig(end_id=END, max_length=12), 1),
    "nucleus": (NucleusConfig(end_id=END, max_length=12), 3),
    "beam": (BeamConfig(end_id=END, max_length=12), 1),
}


@pytest.fixture(scope="module")
def captioner():
    model = MedCaptioner(TINY_VIT, med_golden.NO_DROPOUT)
    load_part(model, med_golden.reference_model().state_dict())
    return model.eval()


def images(number, side=TINY_VIT.image_size):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(number))


def keys(number):
    return [f"key{n}" for n in range(number)]


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_captions_do_not_depend_on_how_many_images_there_are(captioner, way):
    config, each = WAYS[way]
    decoder = CaptionDecoder(captioner, config, PROMPT, seed=1, num_captions=each)
    pixels = images(37)
    together = decoder.decode(pixels, keys(37))
    assert together.shape == (37 * each, 12)
    for start, stop in ((0, 1), (16, 17), (5, 22), (36, 37)):
        part = decoder.decode(pixels[start:stop], keys(37)[start:stop])
        assert torch.equal(part, together[start * each : stop * each])


def test_a_group_equals_plain_greedy_decoding(captioner):
    config = WAYS["greedy"][0]
    pixels = images(6)
    plain = greedy(
        med_decoder(captioner),
        captioner.begin(pixels, max_length=12),
        torch.tensor([PROMPT]).repeat(6, 1),
        config,
    )
    assert torch.equal(CaptionDecoder(captioner, config, PROMPT).decode(pixels, keys(6)), plain)


def test_each_image_is_looked_at_and_projected_once(captioner):
    calls = {"look": 0, "project": 0}
    looked = captioner.image_encoder.register_forward_hook(
        lambda *_: calls.update(look=calls["look"] + 1)
    )
    key = captioner.text.layers[0].cross_attention["both"].key
    projected = key.register_forward_hook(lambda *_: calls.update(project=calls["project"] + 1))
    config, each = WAYS["nucleus"]
    CaptionDecoder(captioner, config, PROMPT, num_captions=each).decode(images(5), keys(5))
    looked.remove()
    projected.remove()
    assert calls == {"look": 5, "project": 5}


def with_recorded_steps(decoder):
    """Let a decoder note how many rows each step has."""
    rows, plain = [], decoder._decoder

    def step(token_ids, state):
        rows.append(len(token_ids))
        return plain.step(token_ids, state)

    decoder._decoder = replace(plain, step=step)
    return rows


def test_captions_that_are_over_leave_the_batch_and_the_last_ends_it(captioner):
    config = NucleusConfig(end_id=END, min_length=3, max_length=31, top_p=1.0)
    with torch.no_grad():
        bias = captioner.text.head.bias
        before = bias[END].item()
        bias[END] += 3  # captions of very different lengths
    decoder = CaptionDecoder(captioner, config, PROMPT, num_captions=8)
    rows = with_recorded_steps(decoder)
    ids = decoder.decode(images(decoder.images_at_once), keys(decoder.images_at_once))
    bias.data[END] = before

    lengths = [row.index(END) if END in row else 30 for row in ids.tolist()]
    assert rows[0] == decoder.images_at_once  # the prompt, once an image
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert len(set(rows[1:])) > 2
    assert all(number % 16 == 0 for number in rows[1:])
    assert len(rows) == max(lengths) - 2  # nothing is decoded when all are over


def test_captions_that_leave_change_no_other(captioner):
    config, _ = WAYS["nucleus"]
    pixels = images(8)
    leaving = CaptionDecoder(captioner, config, PROMPT, seed=2, num_captions=10)
    staying = CaptionDecoder(captioner, config, PROMPT, seed=2, num_captions=10)
    staying._decoder = replace(staying._decoder, keep=None)
    rows = with_recorded_steps(leaving)
    expected = staying.decode(pixels, keys(8))
    assert torch.equal(leaving.decode(pixels, keys(8)), expected)
    assert len(set(rows[1:])) > 1


# --- rounding, at the width of the real models ----------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=3000, num_layers=2)
    vision = VisionConfig(image_size=96, num_layers=1)
    med = MedConfig(bert=bert, caption_start_id=2998, match_start_id=2999)
    return MedCaptioner(vision, med).eval()


def recorded_logits(model, pixels, names, each):
    """Every step's logits of every row that is an image's."""
    decoder = CaptionDecoder(
        model, NucleusConfig(max_length=8), [2998, 10, 11, 12], seed=1, num_captions=each
    )
    logits, plain = [], decoder._decoder

    def step(token_ids, state):
        found, state = plain.step(token_ids, state)
        logits.append(found.clone())
        return found, state

    decoder._decoder = replace(plain, step=step)
    decoder.decode(pixels, names)
    rows = [len(names), *[len(names) * each] * (len(logits) - 1)]
    return [found[:number] for found, number in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("each", [1, 10])
def test_not_a_bit_of_a_logit_depends_on_the_neighbours(wide, each):
    size = 16 if each == 1 else 8
    pixels, names = images(size, 96), keys(size)
    together = recorded_logits(wide, pixels, names, each)
    for first, last in ((0, 1), (2, 7)):
        part = recorded_logits(wide, pixels[first:last], names[first:last], each)
        assert torch.equal(part[0], together[0][first:last])
        for alone, among in zip(part[1:], together[1:], strict=True):
            assert torch.equal(alone, among[first * each : last * each])


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("each", [1, 3])
def test_not_a_bit_of_a_logit_depends_on_the_number_of_threads(wide, set_threads, each):
    pixels, names = images(6, 96), keys(6)
    set_threads(1)
    expected = recorded_logits(wide, pixels, names, each)
    set_threads(2)
    for alone, among in zip(
        recorded_logits(wide, pixels[4:], names[4:], each), expected, strict=True
    ):
        assert torch.equal(alone, among[-len(alone) :])


def test_not_a_bit_of_a_logit_depends_on_who_has_left(wide):
    with torch.inference_mode():
        state = wide.begin(images(8, 96), max_length=6)
        _, state = wide.step(torch.full((8, 2), 10), state)
        state = state.repeated(10)
        tokens = torch.arange(80)[:, None]
        staying = torch.arange(80)[::5]  # 16 of 80
        fewer, _ = wide.step(tokens[staying], state.kept(staying))
        every, _ = wide.step(tokens, state)
    assert torch.equal(fewer, every[staying])


# --- drawing --------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    draw=st.sampled_from([0.0, 0.3, 0.999, 1 - 2**-24]),
    top_p=st.floats(0.01, 1.0),
    top_k=st.sampled_from([None, 1, 40]),
)
def test_a_row_by_itself_draws_what_all_rows_sorted_draw(seed, spread, draw, top_p, top_k):
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(2, 3000, generator=generator)
    scores[:, ::7] = scores[:, :1]  # ties
    scores[:, 5] = -torch.inf
    likely = scores.softmax(dim=1)
    expected = _draw_sorted(likely, torch.tensor([draw, draw]), top_p, top_k).tolist()
    assert [_draw_from_row(row, draw, top_p, top_k) for row in likely.numpy()] == expected
    assert 5 not in expected


def test_ten_thousand_captions_begin_as_transformers_distribution_says(captioner):
    config = NucleusConfig(end_id=END, min_length=0, max_length=4)
    decoder = CaptionDecoder(captioner, config, PROMPT, seed=5, num_captions=1000)
    pixels = images(1).repeat(10, 1, 1, 1)
    ids = decoder.decode(pixels, keys(10))
    counts = ids[:, 3].bincount(minlength=130)

    with torch.no_grad():
        state = captioner.begin(pixels[:1], max_length=4)
        logits, _ = captioner.step(torch.tensor([PROMPT]), state)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), TopPLogitsWarper(0.9)])
    expected = processors(torch.tensor([PROMPT]), logits).softmax(dim=1)[0].double()
    assert counts[expected == 0].sum() == 0
    assert counts.sum() == 10_000
    kept = expected > 0
    assert kept.sum() > 10
    wanted = 10_000 * expected[kept] / expected[kept].sum()
    assert chisquare(counts[kept].numpy(), wanted.numpy()).pvalue > 1e-3


# --- faster steps ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_step_makes_the_same_captions(captioner):
    config, each = WAYS["nucleus"]
    plain = CaptionDecoder(captioner, config, PROMPT, seed=1, num_captions=each)
    compiled = CaptionDecoder(
        captioner, config, PROMPT, seed=1, num_captions=each, is_compiled=True
    )
    expected = plain.decode(images(3), keys(3))
    assert torch.equal(compiled.decode(images(3), keys(3)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_captured_steps_on_a_device_make_the_captions_of_the_cpu(captioner, way):
    config, each = WAYS[way]
    expected = CaptionDecoder(captioner, config, PROMPT, seed=1, num_captions=each)
    expected = expected.decode(images(70), keys(70))
    captioner.cuda()
    decoder = CaptionDecoder(
        captioner, config, PROMPT, seed=1, num_captions=each, is_compiled=way != "beam"
    )
    found = decoder.decode(images(70), keys(70)).cpu()
    captioner.cpu()
    assert_close((found == expected).float().mean(), torch.tensor(1.0), atol=0.02, rtol=0)
