"""Decoding equals transformers' and the reference's, and a caption is a function of its name."""

from dataclasses import replace

import med_golden
import pytest
import stage1_golden
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.bert.configuration_bert import BertConfig as TheirBertConfig
from transformers.models.bert.modeling_bert import BertLMHeadModel

from model.beam_search import BeamConfig, EarlyStopping, beam_search
from model.capfilt import MedCaptioner, load_part
from model.generation import (
    Decoder,
    DecodingConfig,
    NucleusConfig,
    constrained,
    draw_from_nucleus,
    greedy,
    med_decoder,
    nucleus,
    qformer_decoder,
    uniform_draws,
)
from model.vision import TINY_VIT

VOCABULARY = 12
END = 3


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def captions_named(keys, number=1):
    return [(key, n) for key in keys for n in range(number)]


# --- The reference's recorded captions -----------------------------------------------------------


@pytest.fixture(scope="module")
def stage1():
    return stage1_golden.reference_model().eval()


@pytest.fixture(scope="module")
def stage1_arrays():
    return stage1_golden.npz(stage1_golden.A / "data.npz")


def begun_stage1(stage1, arrays):
    prompt = torch.full((6, 1), 128)
    return qformer_decoder(stage1.qformer), stage1.begin_caption(arrays["image_raw"]), prompt


@pytest.mark.parametrize(("name", "end"), [("vi", 3), ("vi_eos111", 111)])
def test_stage_1_greedy_captions_equal_the_reference(stage1, stage1_arrays, name, end):
    config = DecodingConfig(end_id=end, min_length=4, max_length=10)
    ids = greedy(*begun_stage1(stage1, stage1_arrays), config)
    assert torch.equal(ids, stage1_arrays[f"{name}_greedy_ids"])


@pytest.mark.parametrize(("name", "end"), [("vi", 3), ("vi_eos111", 111)])
def test_stage_1_beam_captions_equal_the_reference(stage1, stage1_arrays, name, end):
    config = BeamConfig(end_id=end, min_length=4, max_length=10, score_length_counts_prompt=True)
    found = beam_search(*begun_stage1(stage1, stage1_arrays), config)
    assert torch.equal(found.ids, stage1_arrays[f"{name}_beam3_ids"])
    assert_close(found.scores, stage1_arrays[f"{name}_beam3_scores"], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def captioner():
    model = MedCaptioner(TINY_VIT, med_golden.NO_DROPOUT)
    load_part(model, med_golden.reference_model().state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def med_arrays():
    return med_golden.npz("forward.npz")


def begun_med(captioner, max_length=12, images=slice(0, 6)):
    pixels = med_golden.batch()[0][images]
    prompt = torch.tensor([[128, 10, 11]]).repeat(len(pixels), 1)
    return med_decoder(captioner), captioner.begin(pixels, max_length=max_length), prompt


@pytest.mark.parametrize(("name", "end"), [("gen", 3), ("gen_eos2", 70)])
@pytest.mark.parametrize(("suffix", "penalty"), [("", 1.0), ("_reppen1.1", 1.1)])
def test_med_greedy_captions_equal_the_reference(captioner, med_arrays, name, end, suffix, penalty):
    config = DecodingConfig(end_id=end, max_length=12, repetition_penalty=penalty)
    ids = greedy(*begun_med(captioner), config)
    assert torch.equal(ids, med_arrays[f"{name}_greedy{suffix}_ids"])


@pytest.mark.parametrize(("name", "end"), [("gen", 3), ("gen_eos2", 70)])
def test_d21_med_beams_are_expanded_once_and_equal_the_reference(captioner, med_arrays, name, end):
    config = BeamConfig(end_id=end, max_length=12, score_length_counts_prompt=True)
    found = beam_search(*begun_med(captioner), config)
    assert torch.equal(found.ids, med_arrays[f"{name}_beam3_ids"])
    assert_close(found.scores, med_arrays[f"{name}_beam3_scores"], atol=1e-5, rtol=1e-5)


# --- transformers' generate on a random decoder ---------------------------------------------------


@pytest.fixture(scope="module")
def their_decoder():
    torch.manual_seed(5)
    config = TheirBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        is_decoder=True,
        initializer_range=1.5,
    )
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():  # some captions end early, some late, some not
        model.cls.predictions.bias[END] += 13
    return model


def as_decoder(model):
    """A decoder whose state is all tokens so far: slow and plain."""

    def step(token_ids, state):
        state = token_ids if state is None else torch.cat((state, token_ids), dim=1)
        return model(input_ids=state, use_cache=False).logits[:, -1], state

    return Decoder(step, lambda state, rows: state[rows])


def until_end(ids, end=END, prompt=2):
    """Rows without what follows their end, with which each library pads as it likes."""
    rows = []
    for row in ids.tolist():
        stop = row.index(end, prompt) + 1 if end in row[prompt:] else len(row)
        rows.append(row[:stop])
    return rows


def prompts(batch=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, 2), generator=generator)


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [-1.0, 1.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (EarlyStopping.HEURISTIC, False),
        (EarlyStopping.FIRST, True),
        (EarlyStopping.NEVER, "never"),
    ],
)
def test_beam_captions_equal_transformers(their_decoder, num_beams, length_penalty, ours, theirs):
    config = BeamConfig(
        end_id=END,
        min_length=4,
        max_length=11,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=ours,
    )
    expected = their_decoder.generate(
        prompts(),
        attention_mask=torch.ones_like(prompts()),
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=theirs,
        min_length=4,
        max_length=11,
        eos_token_id=END,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = beam_search(as_decoder(their_decoder), None, prompts(), config)
    assert until_end(found.ids) == until_end(expected.sequences)
    assert_close(found.scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)
    assert len({len(row) for row in until_end(found.ids)}) > 1  # some end early, some do not


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_repetition_penalty_and_new_token_lengths_equal_transformers(
    their_decoder, penalty, num_beams
):
    lengths = {"end_id": END, "min_length": 3, "max_length": 9, "counts_prompt": False}
    expected = their_decoder.generate(
        prompts(),
        attention_mask=torch.ones_like(prompts()),
        num_beams=num_beams,
        min_new_tokens=3,
        max_new_tokens=9,
        repetition_penalty=penalty,
        eos_token_id=END,
        pad_token_id=0,
        do_sample=False,
    )
    decoder = as_decoder(their_decoder)
    if num_beams == 1:
        config = DecodingConfig(**lengths, repetition_penalty=penalty)
        found = greedy(decoder, None, prompts(), config)
    else:
        config = BeamConfig(**lengths, repetition_penalty=penalty, num_beams=num_beams)
        found = beam_search(decoder, None, prompts(), config).ids
    assert until_end(found) == until_end(expected)


@given(
    seed=st.integers(0, 2**31),
    penalty=st.sampled_from([0.7, 1.0, 1.1, 2.0]),
    may_end=st.booleans(),
    top_p=st.floats(0.05, 1.0),
    top_k=st.sampled_from([None, 1, 3, 7]),
)
def test_every_token_that_can_be_drawn_is_one_transformers_would_draw(
    seed, penalty, may_end, top_p, top_k
):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, VOCABULARY, generator=generator)
    ids = torch.randint(0, VOCABULARY, (1, 4), generator=generator)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(MinLengthLogitsProcessor(0 if may_end else 9, END))
    processors.append(TemperatureLogitsWarper(0.7))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    theirs = processors(ids, logits.clone()).softmax(dim=1)[0]

    config = NucleusConfig(end_id=END, repetition_penalty=penalty)
    scores = constrained(logits, ids, config, may_end=may_end) / 0.7
    draws = torch.arange(2048) / 2048
    tokens = draw_from_nucleus(scores.expand(2048, -1), draws, top_p, top_k)
    ours = tokens.bincount(minlength=VOCABULARY) / 2048
    # Evenly spaced draws meet every token in the measure of its probability.
    assert_close(ours, theirs, atol=2 / 2048, rtol=0)


# --- Nucleus sampling -----------------------------------------------------------------------------


def test_sampled_tokens_follow_the_nucleus_distribution():
    probabilities = torch.tensor([0.02, 0.3, 0.05, 0.4, 0.08, 0.15], dtype=torch.float64)
    named = uniform_draws(7, captions_named(f"{n:05d}" for n in range(20_000)), 1, "cpu")
    tokens = draw_from_nucleus(probabilities.log().expand(len(named), -1), named[:, 0], 0.9)
    counts = tokens.bincount(minlength=6)
    assert counts[[0, 2]].tolist() == [0, 0]  # 0.4 + 0.3 + 0.15 reach 0.85; with 0.08 it is enough
    kept = probabilities[[1, 3, 4, 5]]
    expected = kept / kept.sum() * len(named)
    assert chisquare(counts[[1, 3, 4, 5]].numpy(), expected.numpy()).pvalue > 1e-3


def test_draws_are_uniform_and_independent_between_tokens():
    draws = uniform_draws(1, captions_named(f"{n:05d}" for n in range(20_000)), 3, "cpu")
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    cells = (draws * 4).long()
    for cell in (cells[:, 0] * 4 + cells[:, 1], cells[:, 1] * 4 + cells[:, 2]):
        assert chisquare(cell.bincount(minlength=16).numpy()).pvalue > 1e-3


def test_a_draw_is_named_by_seed_key_number_and_token_alone():
    one = uniform_draws(1, [("a", 0), ("b", 0), ("a", 1)], 8, "cpu")
    assert torch.equal(uniform_draws(1, [("b", 0), ("a", 1)], 5, "cpu"), one[1:, :5])
    others = [uniform_draws(2, [("a", 0)], 8, "cpu"), one[1:2], one[2:]]
    assert all(not torch.equal(one[:1], other) for other in others)
    tricky = uniform_draws(1, [("1\na", 0), ("a", 1)], 8, "cpu")
    assert not torch.equal(tricky[0], tricky[1])


def test_draws_stay_what_they_are():
    # Captions that were made once have to come out again: the derivation is part of the corpus.
    draws = uniform_draws(0, [("000000_0000", 0)], 2, "cpu")
    assert draws.mul(2**24).tolist() == [[6802339, 2121224]]


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24])
def test_extreme_draws_stay_in_the_nucleus(draw):
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    token = draw_from_nucleus(scores, torch.tensor([draw]), 0.8)
    assert token.item() in {0, 1}
    assert draw_from_nucleus(scores, torch.tensor([draw]), 1e-9).item() == 0
    flat = torch.zeros(1, 50_000)
    assert draw_from_nucleus(flat, torch.tensor([draw]), 1.0).item() < 50_000


def sampled(captioner, keys, images, number=2, **options):
    config = NucleusConfig(end_id=70, max_length=12, **options)
    draws = uniform_draws(3, captions_named(keys, number), 12, "cpu")
    return nucleus(*begun_med(captioner, images=images), config, draws)


def test_a_caption_depends_on_its_name_and_not_on_its_batch(captioner):
    keys = [f"key{n}" for n in range(6)]
    together = sampled(captioner, keys, slice(0, 6)).view(6, 2, 12)
    assert len({tuple(row) for row in together.flatten(0, 1).tolist()}) > 6
    for n in range(6):
        alone = sampled(captioner, keys[n : n + 1], slice(n, n + 1))
        assert torch.equal(alone, together[n])
    backwards = sampled(captioner, keys[3:], slice(3, 6), number=1)
    assert torch.equal(backwards, together[3:, 0])


def test_sampled_captions_end_once_not_too_early_and_are_padded(captioner):
    ids = sampled(captioner, [f"key{n}" for n in range(6)], slice(0, 6), number=30, min_length=6)
    assert torch.equal(ids[:, :3], torch.tensor([128, 10, 11]).expand(180, 3))
    ended = [row for row in ids.tolist() if 70 in row]
    assert ended
    for row in ended:
        end = row.index(70)
        assert end >= 6
        assert set(row[end + 1 :]) <= {0}


def test_stage_1_samples_several_captions_an_image(stage1, stage1_arrays):
    draws = uniform_draws(0, captions_named("abcdef", 3), 9, "cpu")
    config = NucleusConfig(end_id=3, max_length=10)
    ids = nucleus(*begun_stage1(stage1, stage1_arrays), config, draws)
    assert ids.shape == (18, 10)
    first = nucleus(*begun_stage1(stage1, stage1_arrays), config, draws[::3])
    assert torch.equal(first, ids[::3])


def test_a_certain_nucleus_is_greedy(captioner):
    shared = {"end_id": 70, "max_length": 12, "repetition_penalty": 1.1}
    config = NucleusConfig(**shared, top_p=1e-6)
    draws = uniform_draws(3, captions_named("abcdef"), 9, "cpu")
    ids = nucleus(*begun_med(captioner), config, draws)
    assert torch.equal(ids, greedy(*begun_med(captioner), DecodingConfig(**shared)))


# --- Configuration --------------------------------------------------------------------------------


def test_d20_defaults_are_the_papers():
    config = NucleusConfig()
    assert (config.top_p, config.temperature, config.top_k) == (0.9, 1.0, None)
    assert (config.min_length, config.max_length, config.counts_prompt) == (5, 20, True)
    assert config.repetition_penalty == 1.1
    beams = BeamConfig()
    assert (beams.num_beams, beams.length_penalty, beams.repetition_penalty) == (3, 1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (DecodingConfig, {"min_length": 21}),
        (DecodingConfig, {"repetition_penalty": 0.0}),
        (NucleusConfig, {"top_p": 0.0}),
        (NucleusConfig, {"top_p": 1.5}),
        (NucleusConfig, {"temperature": 0.0}),
        (NucleusConfig, {"top_k": 0}),
        (NucleusConfig, {"max_length": 4}),
        (BeamConfig, {"num_beams": 0}),
    ],
)
def test_impossible_options_are_refused(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def test_a_prompt_that_leaves_no_room_is_refused(captioner):
    with pytest.raises(ValueError, match="nothing can be generated"):
        greedy(*begun_med(captioner), DecodingConfig(min_length=1, max_length=3))


def test_draws_that_do_not_fit_are_refused(captioner):
    config = replace(NucleusConfig(), max_length=12)
    with pytest.raises(ValueError, match=r"draws are \(7, 9\)"):
        nucleus(*begun_med(captioner), config, torch.zeros(7, 9))
    with pytest.raises(ValueError, match="9 or more"):
        nucleus(*begun_med(captioner), config, torch.zeros(6, 8))
