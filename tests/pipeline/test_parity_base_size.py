"""At base size, with random weights, captions and scores are transformers' own."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
)

from model.beam_search import BeamConfig
from model.capfilt import MedCaptioner, MedFilter
from model.captioning import CaptionDecoder
from model.generation import DecodingConfig, constrained
from model.names.blip import CAPTIONER_TRANSFORMERS, FILTER_TRANSFORMERS, med_to_ours
from model.packing import PackedTexts
from model.transformers_configs import blip_to_ours
from model.weight_files import load_strictly
from pipeline.clip_scorer import ClipScorer
from pipeline.models import ImagePreprocessor

PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
START, END = 101, 102
SIDE = 224  # at 384 it is the same code, and three times the time
TEXTS = [[2023, 2003, 1037, 4937], [1037] * 14, [3899, 2006, 1996, 3392, 1010, 2048]]


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def config():
    """BLIP's base sizes, where transformers' defaults are others."""
    sizes = {"num_attention_heads": 12}
    return BlipConfig(
        text_config=sizes | {"encoder_hidden_size": 768},
        vision_config=sizes | {"image_size": SIDE, "layer_norm_eps": 1e-6},
    )


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator).mul_(0.03)
        parameter.copy_(noise.add_(1) if is_scale else noise)
    return model.eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def captioners():
    theirs = randomised(BlipForConditionalGeneration(config()))
    vision, med, _ = blip_to_ours(theirs.config)
    ours = MedCaptioner(vision, med).eval()
    load_strictly(ours, med_to_ours(theirs.state_dict(), CAPTIONER_TRANSFORMERS))
    return ours, theirs


def their_ids(model, pixels, **options):
    ids = torch.tensor([[*PROMPT, END]]).repeat(len(pixels), 1)
    return model.generate(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_length=5,
        do_sample=False,
        **options,
    )


def until_end(ids):
    rows = ids.tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            DecodingConfig(max_length=16, repetition_penalty=1.1),
            {"max_length": 16, "repetition_penalty": 1.1},
        ),
        (BeamConfig(max_length=12), {"max_length": 12, "num_beams": 3}),
    ],
    ids=["greedy", "beam"],
)
def test_ids_of_captions_are_identical(captioners, pixels, ours, theirs):
    found = CaptionDecoder(captioners[0], ours, PROMPT).decode(pixels, ["a", "b"])
    assert until_end(found) == until_end(their_ids(captioners[1], pixels, **theirs))


def test_scores_before_sampling_are_equal(captioners, pixels):
    ours, theirs = captioners
    state = ours.begin(pixels, max_length=9)
    ids = torch.tensor([[*PROMPT, 2023, 4937]]).repeat(2, 1)
    logits, _ = ours.step(ids, state)
    embeds = theirs.vision_model(pixel_values=pixels).last_hidden_state
    expected = theirs.text_decoder(input_ids=ids, encoder_hidden_states=embeds).logits[:, -1]
    assert_close(logits, expected, atol=1e-4, rtol=0)
    scores = constrained(logits, ids, DecodingConfig(), may_end=False)
    assert scores[:, END].tolist() == [-torch.inf, -torch.inf]


def test_itm_and_itc_are_equal(pixels):
    theirs = randomised(BlipForImageTextRetrieval(config()))
    vision, med, joint_width = blip_to_ours(theirs.config)
    ours = MedFilter(vision, med, joint_width=joint_width).eval()
    load_strictly(ours, med_to_ours(theirs.state_dict(), FILTER_TRANSFORMERS))

    texts = [[START, *text, END] for text in TEXTS]
    packed = PackedTexts.of([texts, texts])
    embeds = ours.encode_image(pixels)
    image = ours.text.project_image(embeds, "encoder")
    itm = ours.itm_head(ours.text.encode_packed(packed, image))[:, :3]
    states = ours.text_proj(ours.text.encode_packed(packed))[:, :3]
    features = torch.nn.functional.normalize(states, dim=-1)
    itc = (features * ours.image_features(embeds)[:, None]).sum(dim=2)
    for number, text in enumerate(texts):
        ids = torch.tensor([text, text])
        expected = theirs(pixel_values=pixels, input_ids=ids).itm_score
        assert_close(itm[:, number], expected, atol=1e-4, rtol=0)
        expected = theirs(pixel_values=pixels, input_ids=ids, use_itm_head=False).itm_score
        assert_close(itc[:, number], expected.diagonal(), atol=1e-4, rtol=0)


class Characters:
    """A tokenizer of one token a character, behind CLIP's start and before its end."""

    eos_token_id = 49407

    def __call__(self, texts, truncation, max_length):
        ids = [[49406, *map(ord, text), 49407] for text in texts]
        return {"input_ids": [each[:max_length] for each in ids]}


def test_clip_similarities_are_equal(pixels):
    theirs = randomised(CLIPModel(CLIPConfig(text_config={"eos_token_id": 49407})))
    scorer = ClipScorer(theirs, Characters(), ImagePreprocessor(SIDE))
    texts = ["a cat", "a much longer text than that one", "dog"]
    found = scorer.similarities(pixels, [texts, texts[:1]])
    rows = Characters()(texts, True, 77)["input_ids"]
    ids = torch.tensor([[*row, *[49407] * (40 - len(row))] for row in rows])
    output = theirs(pixel_values=pixels, input_ids=ids)
    expected = output.image_embeds @ output.text_embeds.t()
    assert_close(torch.tensor(found[0]), expected[0], atol=1e-4, rtol=0)
    assert_close(torch.tensor(found[1]), expected[1, :1], atol=1e-4, rtol=0)
