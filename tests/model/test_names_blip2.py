"""The name tables carry weights to transformers and BERT and back, and the models then agree."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file
from stage1_golden import A, reference_model, reference_weights
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForPreTraining,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
)

from model.names.blip2 import (
    LAVIS_ALIASES,
    LAVIS_UNUSED,
    QFORMER_INSTRUCTBLIP,
    QFORMER_TRANSFORMERS,
    STAGE1_LAVIS,
    STAGE1_NOT_IN_TRANSFORMERS,
    STAGE1_TRANSFORMERS,
)
from model.names.rename import to_ours, to_theirs
from model.qformer import QFormer, QFormerConfig
from model.stage1 import Stage1, Stage1Config

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "encoder_hidden_size": 24,
    "use_qformer_text_input": True,
}
OURS = Stage1Config(
    qformer=QFormerConfig(
        vocab_size=61,
        width=32,
        num_layers=3,
        num_heads=4,
        ffn_width=48,
        max_positions=20,
        dropout=0.0,
        num_queries=5,
        image_width=24,
    ),
    joint_width=8,
    caption_start_id=60,
)


def shake(module):
    """Random values everywhere, so that a swapped or forgotten tensor shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.1)
    return module.eval()


class VisionOf(nn.Module):
    """transformers' tower up to, but without, the LayerNorm that is our `ln_vision`."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs = [theirs]  # in a list, so that its weights stay its own

    def forward(self, pixels):
        vision = self.theirs[0].vision_model
        return vision.encoder(inputs_embeds=vision.embeddings(pixels)).last_hidden_state


@pytest.fixture(scope="module")
def theirs():
    vision = Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=Blip2QFormerConfig(**SIZES).to_dict(),
        num_query_tokens=5,
        image_text_hidden_size=8,
        image_token_index=None,
    )
    model = shake(Blip2ForImageTextRetrieval(config))
    # transformers builds it with 1e-6, the released model has 1e-5.
    model.vision_model.post_layernorm.eps = 1e-5
    return model


def stage1_part(state):
    """Their weights without the vision tower, whose names are another table's."""
    return {
        name: value
        for name, value in state.items()
        if not re.match(r"vision_model\.(embeddings|encoder)\.", name)
    }


@pytest.fixture(scope="module")
def ours(theirs):
    model = shake(Stage1(OURS, VisionOf(theirs)))
    renamed = {
        to_ours(name, STAGE1_TRANSFORMERS): value
        for name, value in stage1_part(theirs.state_dict()).items()
    }
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert unexpected == []
    assert all(any(re.fullmatch(p, n) for p in STAGE1_NOT_IN_TRANSFORMERS) for n in missing)
    return model


@pytest.fixture(scope="module")
def pairs():
    torch.manual_seed(2)
    is_real = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    return torch.randn(3, 3, 16, 16), torch.randint(1, 60, (3, 9)) * is_real, is_real


@torch.no_grad()
def test_retrieval_features_equal_transformers(theirs, ours, pairs):
    pixels, ids, is_real = pairs
    output = theirs(pixels, ids, is_real.long())
    image, text = ours.image_features(pixels).feats, ours.text_features(ids, is_real)[:, 0]
    assert_close(image, output.image_embeds, **CLOSE)
    assert_close(text, output.text_embeds, **CLOSE)
    similarity = torch.einsum("iqe,te->itq", image, text).amax(-1)
    assert_close(similarity, output.logits_per_image, **CLOSE)


@torch.no_grad()
def test_matching_logits_equal_transformers(theirs, ours, pairs):
    pixels, ids, is_real = pairs
    output = theirs(pixels, ids, is_real.long(), use_image_text_matching_head=True)
    image = ours.qformer.project_image(ours.encode_image(pixels))
    assert_close(ours.match_logits(image, ids, is_real), output.logits_per_image, **CLOSE)


@torch.no_grad()
def test_query_output_equals_transformers_q_former():
    """Ours to theirs: the Q-Former of stage 2, which has no text."""
    config = QFormerConfig(
        width=32, num_layers=3, num_heads=4, ffn_width=48, dropout=0.0, num_queries=5,
        image_width=24, has_text=False,
    )  # fmt: skip
    ours = shake(QFormer(config))
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**{**SIZES, "use_qformer_text_input": False}))
    renamed = {to_theirs(n, QFORMER_TRANSFORMERS): v for n, v in ours.state_dict().items()}
    del renamed["query_tokens"]
    theirs.eval().load_state_dict({n.removeprefix("qformer."): v for n, v in renamed.items()})
    image = torch.randn(2, 7, 24)
    expected = theirs(ours.query_tokens.expand(2, -1, -1), encoder_hidden_states=image)
    embeds = ours.encode_image(ours.project_image(image)).embeds
    assert_close(embeds, expected.last_hidden_state, **CLOSE)


def test_weights_return_unchanged_from_transformers(theirs, ours):
    state = stage1_part(theirs.state_dict())
    returned = {to_theirs(n, STAGE1_TRANSFORMERS): v for n, v in ours.state_dict().items()}
    homeless = {n for n in ours.state_dict() if to_theirs(n, STAGE1_TRANSFORMERS) is None}
    assert {n for n in homeless if n != "temperature"} == {
        n for n in ours.state_dict() if "language_head" in n
    }
    del returned[None]
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], state[name]) for name in state)


def test_lavis_names_cover_both_sides_exactly():
    theirs = set(load_file(A / "model.safetensors")) - {"visual_encoder.dummy"}
    ours = set(reference_model().state_dict())
    assert set(reference_weights()) == ours
    written = {to_theirs(name, STAGE1_LAVIS) for name in ours}
    left = theirs - written
    unused = {name for name in left if any(re.fullmatch(p, name) for p in LAVIS_UNUSED)}
    assert left - unused == set(LAVIS_ALIASES)
    assert set(LAVIS_ALIASES.values()) <= written


def test_lavis_aliases_hold_the_tensor_they_repeat():
    theirs = load_file(A / "model.safetensors")
    for alias, name in LAVIS_ALIASES.items():
        assert torch.equal(theirs[alias], theirs[name])


def test_instructblip_names_differ_in_the_embeddings_alone():
    differ = [
        (a.theirs, b.theirs)
        for a, b in zip(QFORMER_TRANSFORMERS, QFORMER_INSTRUCTBLIP, strict=True)
        if a != b
    ]
    assert [theirs for _, theirs in differ] == [
        "qformer.embeddings.layernorm.{}",
        "qformer.embeddings.word_embeddings.weight",
        "qformer.embeddings.position_embeddings.weight",
    ]


# Starting from BERT.


@pytest.fixture(scope="module")
def bert():
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20,
    )  # fmt: skip
    return shake(BertForPreTraining(config))


def test_q_former_starts_from_bert(bert):
    qformer = QFormer(OURS.qformer)
    before = {name: value.clone() for name, value in qformer.state_dict().items()}
    qformer.load_bert(bert.state_dict())
    layer, source = qformer.layers[1], bert.bert.encoder.layer[1]
    assert torch.equal(layer.attention.key.weight, source.attention.self.key.weight)
    assert torch.equal(layer.query_ffn.up.weight, source.intermediate.dense.weight)
    assert torch.equal(layer.query_ffn.norm.bias, layer.text_ffn.norm.bias)
    words = bert.bert.embeddings.word_embeddings.weight
    assert torch.equal(qformer.word_embeddings.weight[:60], words)
    # What BERT lacks stays as it was drawn: the row of [DEC], queries and cross-attention.
    assert torch.equal(qformer.word_embeddings.weight[60], before["word_embeddings.weight"][60])
    assert torch.equal(qformer.query_tokens, before["query_tokens"])
    kept = "layers.0.cross_attention.value.weight"
    assert torch.equal(qformer.state_dict()[kept], before[kept])


@torch.no_grad()
def test_text_pass_of_a_bert_without_token_types_equals_it(bert):
    theirs = BertForPreTraining(bert.config).eval()
    theirs.load_state_dict(bert.state_dict())
    theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    qformer = QFormer(OURS.qformer).eval()
    qformer.load_bert(theirs.state_dict())
    ids, is_real = torch.randint(60, (2, 7)), torch.arange(7) < torch.tensor([7, 3])[:, None]
    output = theirs.bert(ids, attention_mask=is_real.long()).last_hidden_state
    states = qformer.encode_text(ids, is_real)
    assert_close(states[is_real], output[is_real], **CLOSE)
    logits = theirs.cls.predictions(output)
    assert_close(qformer.next_token_logits(states)[is_real][:, :60], logits[is_real], **CLOSE)


def test_bert_file_with_old_layer_norm_names_loads(bert):
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for n, v in bert.state_dict().items()
    }
    qformer = QFormer(OURS.qformer)
    qformer.load_bert(old)
    assert torch.equal(qformer.embedding_norm.weight, bert.bert.embeddings.LayerNorm.weight)


def test_incomplete_or_foreign_bert_is_refused_by_name(bert):
    state = bert.state_dict()
    del state["bert.encoder.layer.2.output.dense.bias"]
    state["bert.encoder.layer.9.adapter.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"adapter\.weight.*layers\.2\.text_ffn\.down\.bias"):
        QFormer(OURS.qformer).load_bert(state)


def test_bert_of_another_width_is_refused(bert):
    wider = dataclasses.replace(OURS.qformer, width=64)
    with pytest.raises(ValueError, match=r"64\), BERT's is \(.*32\)|64,\), BERT's is \(32,\)"):
        QFormer(wider).load_bert(bert.state_dict())
