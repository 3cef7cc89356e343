"""Stage 2: label layouts, frozen language models, and equality with transformers' Blip2."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage2_tiny import (
    CLOSE,
    CONFIG,
    IMAGE_TOKEN,
    NUM_QUERIES,
    VISION,
    gpt2_style,
    opt_config,
    our_model,
    our_weights,
    pixels,
    qwen_config,
    shake,
    t5_config,
    t5_style,
    their_model,
)
from torch.testing import assert_close
from transformers import AutoModel

from model.llm import ANSWERS, FrozenLlm, LlmDecodingConfig, build_llm, load_llm
from model.llm_text import (
    CausalText,
    LlmTokenizer,
    causal_text,
    padded,
    prefix_text,
    prompt_text,
    split_caption,
)
from model.losses import IGNORED
from model.names.rename import to_theirs
from model.names.stage2 import STAGE2_LAVIS
from model.qformer import QFormerConfig
from model.stage1 import Stage1, Stage1Config
from model.stage2 import Stage2, Stage2Config
from model.vision import FrozenImageEncoder, LnVision

NEWLINE = 202
GREEDY = LlmDecodingConfig(num_beams=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def bpe():
    return LlmTokenizer.for_causal(gpt2_style())


@pytest.fixture(scope="module")
def unigram():
    return LlmTokenizer.for_encoder_decoder(t5_style())


# --- Label layouts (Sec. 3.3) ---------------------------------------------------------------------


def test_11_opt_learns_bos_caption_and_newline(bpe):
    batch = causal_text(bpe, ["a cat", "two birds on the grass"])
    first, second = bpe.ids("a cat"), bpe.ids("two birds on the grass")
    padding = len(second) - len(first)
    assert batch.text.token_ids.tolist() == [
        [2, *first, NEWLINE, *[1] * padding],
        [2, *second, NEWLINE],
    ]
    # BOS is a target: the last query predicts it.
    assert batch.targets.tolist() == [
        [2, *first, NEWLINE, *[IGNORED] * padding],
        [2, *second, NEWLINE],
    ]
    assert batch.text.is_real.sum(dim=1).tolist() == [len(first) + 2, len(second) + 2]


def test_11_a_prompt_and_the_bos_before_it_are_no_targets(bpe):
    batch = causal_text(bpe, ["a cat"], prompts="a photo of")
    prompt_length = 1 + len(bpe.ids("a photo of"))
    whole = [2, *bpe.ids("a photo of a cat"), NEWLINE]
    assert batch.text.token_ids.tolist() == [whole]
    assert batch.targets.tolist() == [[IGNORED] * prompt_length + whole[prompt_length:]]


def test_d18_each_question_is_masked_by_its_own_length(bpe):
    prompts = ["Question: a cat", "Question: two red birds on the grass"]
    batch = causal_text(bpe, ["a dog", "two"], prompts=prompts)
    counted = (batch.targets != IGNORED).sum(dim=1).tolist()
    assert counted == [len(bpe.ids(" a dog")) + 1, len(bpe.ids(" two")) + 1]


def test_d19_truncation_never_takes_the_newline(bpe):
    batch = causal_text(bpe, ["a cat on the grass " * 9], max_length=12)
    assert batch.text.token_ids.shape == (1, 12)
    assert batch.text.token_ids[0, -1] == NEWLINE == batch.targets[0, -1]


def test_the_newline_is_the_token_that_follows_a_caption(bpe):
    caption = "two red birds"
    assert bpe.ids(caption + "\n") == [*bpe.ids(caption), NEWLINE]


def test_11_t5_reads_a_prefix_and_learns_the_suffix_each_with_its_end(unigram):
    batch = prefix_text(unigram, ["a photo", "two red"], ["of a cat", "birds"])
    ends = [*unigram.ids("birds"), 1]
    first = [*unigram.ids("of a cat"), 1]
    assert batch.prefix.token_ids.tolist() == [
        [*unigram.ids("a photo"), 1],
        [*unigram.ids("two red"), 1],
    ]
    assert batch.targets.tolist() == [first, ends + [IGNORED] * (len(first) - len(ends))]
    cut = prefix_text(unigram, ["a cat on the grass " * 9], ["two " * 50], max_length=10)
    assert cut.prefix.token_ids.shape == cut.suffix.token_ids.shape == (1, 10)
    assert cut.prefix.token_ids[0, -1] == cut.suffix.token_ids[0, -1] == 1


@given(num_words=st.integers(0, 40), seed=st.integers(0, 99), key=st.text(max_size=9))
def test_a_split_is_between_the_first_word_and_the_middle(num_words, seed, key):
    words = [f"w{n}" for n in range(num_words)]
    prefix, suffix = split_caption("  ".join(words), seed=seed, key=key)
    assert (prefix.split() + suffix.split()) == words
    if num_words < 2:
        assert prefix == ""
    else:
        assert 1 <= len(prefix.split()) <= max(1, num_words // 2)


def test_splits_are_uniform_and_repeat_for_the_same_sample():
    caption = "one two three four five six seven eight"
    counts = [0] * 5
    for n in range(4000):
        counts[len(split_caption(caption, seed=1, key=f"{n}")[0].split())] += 1
    assert counts[0] == 0
    assert all(abs(count - 1000) < 150 for count in counts[1:])
    again = {split_caption(caption, seed=1, key="k", epoch=epoch) for epoch in range(20)}
    assert len(again) > 1
    assert split_caption(caption, seed=1, key="k") == split_caption(caption, seed=1, key="k")


def test_d19_prompts_to_generate_from_are_padded_on_the_left_whatever_came_before(bpe, unigram):
    causal_text(bpe, ["a cat", "a red dog"])
    batch = prompt_text(bpe, ["", "a photo of"], is_encoder_decoder=False)
    prompt = [2, *bpe.ids("a photo of")]
    assert batch.token_ids.tolist() == [[1] * (len(prompt) - 1) + [2], prompt]
    assert batch.is_real[0].tolist() == [False] * (len(prompt) - 1) + [True]
    assert bpe.tokenizer.padding_side == "right"
    read = prompt_text(unigram, ["", "a cat"], is_encoder_decoder=True)
    assert read.token_ids[:, -1].tolist() == [1, 1]


def test_d19_one_prompt_alone_where_a_list_is_asked_for_is_refused(bpe):
    with pytest.raises(ValueError, match="a list of texts was expected"):
        prompt_text(bpe, "a photo of", is_encoder_decoder=False)
    with pytest.raises(ValueError, match="1 prompts for 2 texts"):
        causal_text(bpe, ["a", "b"], prompts=["a photo of"])


def test_a_prompt_that_fills_the_text_is_refused(bpe):
    with pytest.raises(ValueError, match="leaves no room"):
        causal_text(bpe, ["a cat"], prompts="a photo of", max_length=5)


# --- Tokenizers -----------------------------------------------------------------------------------


def test_bos_is_what_the_tokenizer_puts_there_or_what_is_asked_for():
    assert LlmTokenizer.for_causal(gpt2_style()).start_ids == (2,)
    bare = gpt2_style(adds_bos=False)
    assert LlmTokenizer.for_causal(bare).start_ids == ()
    assert LlmTokenizer.for_causal(bare, has_bos=True).start_ids == (2,)
    assert LlmTokenizer.for_causal(gpt2_style(), has_bos=False).start_ids == ()


@pytest.mark.parametrize(
    ("config", "make", "expected"),
    [
        (opt_config, lambda: gpt2_style(adds_bos=False), ((2,), NEWLINE)),
        (qwen_config, lambda: gpt2_style(adds_bos=False), ((), NEWLINE)),
        (t5_config, t5_style, ((), 1)),
    ],
    ids=["opt", "qwen2", "t5"],
)
def test_each_kind_of_llm_gets_the_ids_it_was_trained_with(config, make, expected):
    tokenizer = LlmTokenizer.for_llm(make(), config())
    assert (tokenizer.start_ids, tokenizer.stop_id) == expected


def test_the_stop_is_a_newline_or_the_end_token():
    assert LlmTokenizer.for_causal(gpt2_style()).stop_id == NEWLINE
    assert LlmTokenizer.for_causal(gpt2_style(), stops_at_newline=False).stop_id == 2


def test_a_tokenizer_without_a_pad_token_will_do_for_a_decoder_only_llm():
    tokenizer = LlmTokenizer.for_causal(gpt2_style(pad_token=None))
    batch = causal_text(tokenizer, ["a cat", "two red birds"])
    assert batch.text.token_ids[0, -1] == NEWLINE
    assert batch.targets[0, -1] == IGNORED


def test_missing_special_tokens_are_errors_that_name_them():
    bare = gpt2_style(adds_bos=False, bos_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"no bos_token_id; pass has_bos=False"):
        LlmTokenizer.for_causal(bare, has_bos=True)
    with pytest.raises(ValueError, match="no eos_token_id"):
        LlmTokenizer.for_causal(bare, stops_at_newline=False)
    with pytest.raises(ValueError, match="no token of its own for a newline"):
        LlmTokenizer.for_causal(t5_style())
    with pytest.raises(ValueError, match="no pad_token_id"):
        LlmTokenizer.for_encoder_decoder(t5_style(pad_token=None))


# --- Equality with transformers -------------------------------------------------------------------


def paired(text_config, seed=0):
    theirs = their_model(text_config, seed)
    ours = our_model(text_config)
    ours.load_state_dict(our_weights(theirs))
    return ours, theirs


def with_queries(token_ids, is_real):
    """transformers' input: an image token for each query, in front."""
    batch = len(token_ids)
    ids = torch.cat((torch.full((batch, NUM_QUERIES), IMAGE_TOKEN), token_ids), dim=1)
    return ids, torch.cat((torch.ones(batch, NUM_QUERIES, dtype=torch.long), is_real.long()), dim=1)


@pytest.mark.parametrize("config", [opt_config, qwen_config], ids=["opt", "qwen2"])
def test_decoder_only_logits_and_loss_equal_transformers(config, bpe):
    ours, theirs = paired(config())
    text = causal_text(bpe, ["a cat", "two birds on the grass", "a dog"])
    ids, mask = with_queries(text.text.token_ids, text.text.is_real)
    labels = torch.cat((torch.full((3, NUM_QUERIES), IGNORED), text.targets), dim=1)
    with torch.no_grad():
        found = ours(pixels(), text)
        expected = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask, labels=labels)
    logits = expected.logits[:, NUM_QUERIES - 1 : -1]
    real = text.text.is_real
    assert_close(found.logits[real], logits[real], **CLOSE)
    assert_close(found.loss, expected.loss, **CLOSE)


def test_t5_logits_and_loss_equal_transformers(unigram):
    ours, theirs = paired(t5_config())
    text = prefix_text(unigram, ["a", "two red", ""], ["cat", "birds on the grass", "a dog"])
    ids, mask = with_queries(text.prefix.token_ids, text.prefix.is_real)
    with torch.no_grad():
        found = ours(pixels(), text)
        expected = theirs(
            pixel_values=pixels(),
            input_ids=ids,
            attention_mask=mask,
            labels=text.targets,
            decoder_attention_mask=text.suffix.is_real.long(),
        )
    real = text.suffix.is_real
    assert_close(found.logits[real], expected.logits[real], **CLOSE)
    assert_close(found.loss, expected.loss, **CLOSE)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("config", [opt_config, t5_config], ids=["opt", "t5"])
def test_generated_ids_equal_transformers(config, num_beams, bpe, unigram):
    ours, theirs = paired(config())
    is_t5 = config is t5_config
    tokenizer = unigram if is_t5 else bpe
    prompts = ["", "a photo of", "two red"]
    text = prompt_text(tokenizer, prompts, is_encoder_decoder=is_t5)
    ids, mask = with_queries(text.token_ids, text.is_real)
    options = LlmDecodingConfig(num_beams=num_beams, max_new_tokens=6)
    with torch.no_grad():
        found = ours.llm.generate(
            ours.soft_prompt(pixels()), text.token_ids, text.is_real, options, stop_id=7, pad_id=1
        )
        expected = theirs.generate(
            pixel_values=pixels(),
            input_ids=ids,
            attention_mask=mask,
            num_beams=num_beams,
            max_new_tokens=6,
            min_new_tokens=1,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=1,
        )
    new = expected[:, 1:] if is_t5 else expected[:, ids.shape[1] :]
    assert torch.equal(found, new)
    texts = ours.generate(pixels(), prompts, tokenizer, options)
    assert len(texts) == 3


# --- Frozen language models -----------------------------------------------------------------------


def test_only_the_bridge_learns(bpe):
    model = our_model(opt_config()).train()
    model(pixels(1), causal_text(bpe, ["a cat"])).loss.backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(("llm.", "image_encoder."))
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
    learning = set(model.trainable_state())
    assert {name.split(".")[0] for name in learning} == {"ln_vision", "qformer", "projection"}


@pytest.mark.parametrize("has_dropout", [True, False])
def test_the_llms_dropout_is_a_choice_that_survives_train(bpe, has_dropout):
    model = our_model(opt_config(dropout=0.5), has_dropout=has_dropout)
    text = causal_text(bpe, ["a cat"])
    model.train()
    assert model.llm.model.training == has_dropout
    torch.manual_seed(0)
    losses = {model(pixels(1), text).loss.item() for _ in range(3)}
    assert (len(losses) > 1) == has_dropout
    model.eval()
    assert not model.llm.model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [opt_config, t5_config], ids=["opt", "t5"])
def test_d17_a_half_precision_llm_leaves_what_learns_in_float32(config, dtype, bpe, unigram):
    full = shake(our_model(config()), std=0.1)
    model = our_model(config(), dtype=dtype)
    model.load_state_dict(full.state_dict())
    if config is t5_config:
        text = prefix_text(unigram, ["a"], ["cat"])
    else:
        text = causal_text(bpe, ["a cat"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(pixels(1), text).loss
    loss.backward()
    assert model.llm.dtype == dtype
    assert loss.dtype == torch.float32
    assert {tensor.dtype for tensor in model.trainable_state().values()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert_close(loss, full(pixels(1), text).loss, rtol=0.05, atol=0.05)


def test_flan_t5_gets_the_exact_gelu_and_its_config_says_so():
    theirs = build_llm(t5_config(dense_act_fn="gelu_new"))
    exact = build_llm(t5_config())
    theirs.load_state_dict(exact.state_dict())
    prefix, ids = torch.randn(1, 3, 32) * 9, torch.tensor([[4, 5]])
    real = torch.ones_like(ids, dtype=torch.bool)
    logits = [llm.eval().suffix_logits(prefix, ids, real, ids, real) for llm in (theirs, exact)]
    assert torch.equal(*logits)
    assert theirs.model.config.dense_act_fn == "gelu"


def test_d20_what_a_models_generation_config_says_is_not_used(bpe):
    prefix, ids = torch.randn(2, 3, 32), torch.tensor([[4, 5], [6, 7]])
    llm = build_llm(opt_config()).model
    plain = FrozenLlm(llm).eval()
    real = torch.ones_like(ids, dtype=torch.bool)
    expected = plain.generate(prefix, ids, real, GREEDY, stop_id=9, pad_id=1)
    llm.generation_config.repetition_penalty = 0.01
    llm.generation_config.no_repeat_ngram_size = 1
    again = FrozenLlm(llm).eval().generate(prefix, ids, real, GREEDY, stop_id=9, pad_id=1)
    assert torch.equal(expected, again)


def test_d19_new_tokens_are_counted_without_queries_and_prompt():
    llm = build_llm(opt_config()).eval()
    for length in (1, 6):
        ids = torch.full((2, length), 5)
        real = torch.ones_like(ids, dtype=torch.bool)
        config = LlmDecodingConfig(num_beams=2, min_new_tokens=4, max_new_tokens=4)
        new = llm.generate(torch.randn(2, 3, 32), ids, real, config, stop_id=319, pad_id=1)
        assert new.shape == (2, 4)


def test_sampling_follows_the_global_generator():
    llm = build_llm(opt_config()).eval()
    ids = torch.full((4, 1), 5)
    real = torch.ones_like(ids, dtype=torch.bool)
    config = LlmDecodingConfig(top_p=0.9, max_new_tokens=8)

    def sample(seed):
        torch.manual_seed(seed)
        return llm.generate(torch.zeros(4, 3, 32), ids, real, config, stop_id=319, pad_id=1)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_answers_are_short_and_favoured_for_it():
    assert (ANSWERS.max_new_tokens, ANSWERS.length_penalty, ANSWERS.num_beams) == (10, -1.0, 5)
    with pytest.raises(ValueError, match="min_new_tokens"):
        replace(ANSWERS, min_new_tokens=11)


@pytest.mark.parametrize("config", [opt_config, t5_config, qwen_config])
def test_a_language_model_is_loaded_by_the_name_of_its_folder(config, tmp_path):
    saved = build_llm(config())
    saved.model.save_pretrained(tmp_path)
    loaded = load_llm(str(tmp_path), dtype=torch.float32)
    assert loaded.is_encoder_decoder == (config is t5_config)
    assert loaded.width == 32
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in saved.state_dict().items())


def test_a_model_without_a_language_head_is_refused():
    with pytest.raises(ValueError, match="no language modelling head"):
        FrozenLlm(AutoModel.from_config(opt_config()))


def test_the_wrong_kind_of_text_is_refused(bpe, unigram):
    with pytest.raises(ValueError, match="learns from CausalText"):
        our_model(opt_config())(pixels(1), prefix_text(unigram, ["a"], ["cat"]))
    with pytest.raises(ValueError, match="learns from PrefixText"):
        our_model(t5_config())(pixels(1), causal_text(bpe, ["a cat"]))


def test_d28_candidates_rank_alike_alone_and_beside_longer_ones(bpe):
    model = shake(our_model(opt_config()))
    alone = model.log_likelihoods(pixels(1), causal_text(bpe, ["a cat"]))
    texts = causal_text(bpe, ["a cat", "two red birds on the grass"])
    both = model.log_likelihoods(pixels(1).repeat(2, 1, 1, 1), texts)
    assert_close(both[:1], alone, **CLOSE)
    assert both[1] < both[0]


# --- Starting from stage 1, and sizes -------------------------------------------------------------


def stage1_weights():
    qformer = replace(CONFIG.qformer, has_text=True, vocab_size=50, max_positions=10)
    config = Stage1Config(qformer=qformer, joint_width=8, caption_start_id=49)
    return shake(Stage1(config, FrozenImageEncoder(VISION))).state_dict()


def test_stage_2_starts_from_what_stage_1_learned():
    model = our_model(opt_config())
    weights = stage1_weights()
    tower = model.image_encoder.positions.clone()
    model.load_stage1(weights)
    for name, tensor in model.trainable_state().items():
        assert name.startswith("projection.") or torch.equal(tensor, weights[name]), name
    assert torch.equal(model.image_encoder.positions, tower)


def test_d15_a_stage_1_file_without_the_query_ffn_is_refused_by_name():
    weights = stage1_weights()
    weights.pop("qformer.layers.1.query_ffn.up.weight")
    weights["qformer.surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"lack \['qformer.layers.1.query_ffn.up.weight'\]") as e:
        our_model(opt_config()).load_stage1(weights)
    assert "qformer.surprise" in str(e.value)


def test_the_text_side_is_not_built():
    names = our_model(opt_config()).state_dict()
    assert not [name for name in names if "text_ffn" in name or "word_embeddings" in name]
    with pytest.raises(ValueError, match="has_text=False"):
        Stage2Config(qformer=QFormerConfig())


@pytest.mark.parametrize(
    ("image_width", "llm_width", "millions"),
    [
        (1408, 2560, 107.1),  # ViT-g, OPT-2.7B
        (1408, 4096, 108.3),  # ViT-g, OPT-6.7B and FlanT5-XXL
        (1408, 2048, 106.7),  # ViT-g, FlanT5-XL
        (1024, 2560, 103.6),  # ViT-L, OPT-2.7B
        (1024, 2048, 103.2),  # ViT-L, FlanT5-XL
    ],
)
def test_what_learns_has_the_papers_parameter_count(image_width, llm_width, millions):
    llm = opt_config(hidden_size=llm_width, word_embed_proj_dim=llm_width)
    with torch.device("meta"):
        qformer = QFormerConfig(has_text=False, image_width=image_width)
        tower = FrozenImageEncoder(VISION)
        model = Stage2(Stage2Config(qformer=qformer), tower, build_llm(llm))
    count = sum(tensor.numel() for tensor in model.trainable_state().values())
    assert round(count / 1e6, 1) == millions


def test_ln_vision_normalises_in_float32_with_the_references_eps():
    norm = shake(LnVision(24))
    states = torch.randn(2, 3, 24) * 1e-3  # where eps tells
    expected = torch.nn.functional.layer_norm(states, (24,), norm.weight, norm.bias, 1e-5)
    assert_close(norm(states), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(states.bfloat16()).dtype == torch.bfloat16


def test_lavis_names_of_stage_2():
    assert to_theirs("projection.weight", STAGE2_LAVIS["opt"]) == "opt_proj.weight"
    name = "qformer.layers.0.query_ffn.up.weight"
    assert to_theirs(name, STAGE2_LAVIS["t5"]) == (
        "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"
    )
    assert to_theirs("llm.model.shared.weight", STAGE2_LAVIS["t5"]) == "t5_model.shared.weight"


def test_padding_is_masked_on_either_side():
    left = padded([[1, 2], [3]], 0, on_the_left=True)
    assert left.token_ids.tolist() == [[1, 2], [0, 3]]
    assert padded([[1, 2], [3]], 0).is_real.tolist() == [[True, True], [True, False]]
    assert CausalText(left, left.token_ids).to("cpu").text.is_real.equal(left.is_real)
