"""Every model travels to transformers, LAVIS and BLIP and back, and nothing is lost in silence."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from med_golden import NO_DROPOUT
from safetensors.torch import load_file, save_file
from stage2_tiny import (
    CLOSE,
    CONFIG,
    IMAGE_TOKEN,
    NUM_QUERIES,
    VISION,
    opt_config,
    our_model,
    pixels,
    qwen_config,
    shake,
    t5_config,
    their_model,
)
from torch.testing import assert_close
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from model import lavis_files
from model.beam_search import BeamConfig, beam_search
from model.capfilt import MedCaptioner, MedFilter
from model.checkpoints import (
    OURS_ALONE,
    load_captioner,
    load_filter,
    load_stage1,
    load_stage2,
    save_captioner,
    save_filter,
    save_stage1,
    save_stage2,
)
from model.generation import DecodingConfig, greedy, med_decoder
from model.names.blip import CAPTIONER_BLIP, FILTER_BLIP
from model.names.vision import CLIP_VIT, EVA_VIT, vision_to_theirs
from model.stage1 import Stage1, Stage1Config
from model.vision import TINY_VIT, FrozenImageEncoder, ImageEncoder
from model.weight_files import CheckpointError, load_strictly, read_weights

CLIP = replace(
    VISION,
    has_key_bias=True,
    has_patch_bias=False,
    has_norm_before=True,
    activation="quick_gelu",
    align_corners=True,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- BLIP and transformers ------------------------------------------------------------------------


def blip_config():
    text = {
        "vocab_size": 130,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 32,
        "bos_token_id": 128,
        "sep_token_id": 3,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    }
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)


def blip_inputs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    ids = torch.randint(4, 128, (3, 7), generator=generator)
    ids[:, 0] = 128
    return images, ids


@pytest.fixture(scope="module")
def their_captioner():
    model = shake(BlipForConditionalGeneration(blip_config()).eval(), std=0.2)
    with torch.no_grad():  # some captions end early
        model.text_decoder.cls.predictions.bias[3] = 2.0
    return model


def captioners_agree(ours, theirs):
    images, ids = blip_inputs()
    image = ours.project_image(ours.image_encoder(images))
    logits = ours.text.decode(ids, torch.ones_like(ids, dtype=torch.bool), image)
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert_close(logits, expected.logits, **CLOSE)


def test_a_captioner_of_transformers_gives_its_logits(their_captioner, tmp_path):
    their_captioner.save_pretrained(tmp_path)
    captioners_agree(load_captioner(tmp_path), their_captioner)


def test_transformers_loads_our_captioner_with_its_logits_and_all_its_settings(tmp_path):
    ours = shake(MedCaptioner(TINY_VIT, NO_DROPOUT).eval(), std=0.2)
    save_captioner(ours, tmp_path)
    theirs, report = BlipForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    captioners_agree(ours, theirs.eval())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["num_attention_heads"] == 4
    assert config["vision_config"]["layer_norm_eps"] == 1e-6
    assert config["label_smoothing"] == 0.1
    equal_states(load_captioner(tmp_path), ours)
    assert load_captioner(tmp_path).text.config == ours.text.config


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_of_a_loaded_captioner_equal_transformers(their_captioner, tmp_path, num_beams):
    their_captioner.save_pretrained(tmp_path)
    ours = load_captioner(tmp_path)
    images, _ = blip_inputs()
    prompt = torch.tensor([[128, 10, 11]]).repeat(3, 1)
    expected = their_captioner.generate(
        pixel_values=images,
        # transformers takes the prompt with its [SEP], which it removes.
        input_ids=torch.cat((prompt, torch.full((3, 1), 3)), dim=1),
        num_beams=num_beams,
        min_length=5,
        max_length=12,
        do_sample=False,
    )
    # After the end, transformers' beams repeat it when the padding's id is 0.
    lengths = {"end_id": 3, "min_length": 5, "max_length": 12, "pad_id": 3 if num_beams > 1 else 0}
    state = ours.begin(images, max_length=12)
    if num_beams == 1:
        found = greedy(med_decoder(ours), state, prompt, DecodingConfig(**lengths))
    else:
        found = beam_search(med_decoder(ours), state, prompt, BeamConfig(**lengths)).ids
    assert torch.equal(found, expected)
    assert 0 < (found == 3).any(dim=1).sum() < 3


def filters_agree(ours, theirs):
    images, ids = blip_inputs()
    real = torch.ones_like(ids, dtype=torch.bool)
    embeds = ours.encode_image(images)
    image = ours.text.project_image(embeds, "encoder")
    itm = theirs(pixel_values=images, input_ids=ids, attention_mask=real.long())
    assert_close(ours.match_logits(image, ids, real, keeps_cls=True), itm.itm_score, **CLOSE)
    itc = theirs(pixel_values=images, input_ids=ids, attention_mask=real.long(), use_itm_head=False)
    assert_close(ours.similarity(embeds, ids, real), itc.itm_score.diagonal(), **CLOSE)


def test_a_filter_of_transformers_gives_its_scores(tmp_path):
    theirs = shake(BlipForImageTextRetrieval(blip_config()).eval(), std=0.2)
    theirs.save_pretrained(tmp_path)
    filters_agree(load_filter(tmp_path), theirs)


def test_transformers_loads_our_filter_with_its_scores(tmp_path):
    ours = shake(MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16).eval(), std=0.2)
    save_filter(ours, tmp_path)
    filters_agree(ours, BlipForImageTextRetrieval.from_pretrained(tmp_path).eval())
    equal_states(load_filter(tmp_path), ours)


@pytest.mark.parametrize(
    ("build", "format"),
    [
        (lambda: MedCaptioner(TINY_VIT, NO_DROPOUT), CAPTIONER_BLIP),
        (lambda: MedFilter(TINY_VIT, NO_DROPOUT, joint_width=16), FILTER_BLIP),
    ],
)
def test_13_med_returns_unchanged_from_a_file_of_blip(build, format, tmp_path):
    model, again = shake(build()), build()
    lavis_files.save_med(model, tmp_path / "blip.safetensors", format)
    torch.save({"model": load_file(tmp_path / "blip.safetensors")}, tmp_path / "blip.pth")
    lavis_files.load_med(again, tmp_path / "blip.pth", format)
    equal_states(again, model)


# --- BLIP-2 and transformers ----------------------------------------------------------------------

STAGE1 = Stage1Config(
    qformer=replace(CONFIG.qformer, has_text=True, vocab_size=50, max_positions=10),
    joint_width=8,
    caption_start_id=49,
)


def our_stage1(vision=VISION, seed=0):
    model = shake(Stage1(STAGE1, FrozenImageEncoder(vision)).eval(), seed)
    model.ln_vision.eps = 1e-6  # transformers' eps, unless a test says otherwise
    return model


def their_stage1():
    config = Blip2Config(
        vision_config=their_model(opt_config()).config.vision_config.to_dict(),
        qformer_config={
            "vocab_size": 50,
            "max_position_embeddings": 10,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "use_qformer_text_input": True,
        },
        num_query_tokens=NUM_QUERIES,
        image_text_hidden_size=8,
    )
    return shake(Blip2ForImageTextRetrieval(config).eval())


def stage1_models_agree(ours, theirs, tolerance=CLOSE):
    ids = torch.randint(4, 49, (3, 6), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(ids, dtype=torch.bool)
    images = ours.qformer.project_image(ours.encode_image(pixels()))
    itm = theirs(
        pixel_values=pixels(),
        input_ids=ids,
        attention_mask=real.long(),
        use_image_text_matching_head=True,
    )
    assert_close(ours.match_logits(images, ids, real), itm.logits_per_image, **tolerance)
    itc = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=real.long())
    feats = ours.image_features(pixels()).feats  # (3, Q, E)
    text = ours.text_features(ids, real)[:, 0]
    similarity = (feats @ text.t()).amax(dim=1)  # D32: over queries, not over temperature
    assert_close(similarity, itc.logits_per_image, **tolerance)


def test_stage_1_of_transformers_gives_its_scores(tmp_path):
    theirs = their_stage1()
    theirs.save_pretrained(tmp_path)
    ours = load_stage1(tmp_path)
    stage1_models_agree(ours, theirs)
    assert ours.config.caption_start_id == 49
    assert ours.temperature.item() == pytest.approx(0.07)
    assert load_stage1(tmp_path, ln_vision_eps=1e-5).ln_vision.eps == 1e-5


def test_13_transformers_loads_our_stage_1_and_the_rest_comes_back_from_beside(tmp_path):
    ours = our_stage1()
    save_stage1(ours, tmp_path)
    theirs, report = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stage1_models_agree(ours, theirs.eval())
    aside = load_file(tmp_path / OURS_ALONE)
    assert {name.split(".")[0] for name in aside} == {"temperature", "qformer"}
    assert "qformer.language_head.bias" in aside
    again = load_stage1(tmp_path)
    equal_states(again, ours)
    assert again.config == ours.config


def test_d29_ln_vision_deviates_in_transformers_by_its_eps_and_not_in_ours(tmp_path):
    ours = our_stage1()
    ours.ln_vision.eps = 1e-5
    save_stage1(ours, tmp_path)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path).eval()
    assert theirs.vision_model.encoder.layers[0].layer_norm1.eps == 1e-6  # the blocks are right
    assert theirs.vision_model.post_layernorm.eps == 1e-6
    variance = ours.image_encoder(pixels()).var(dim=2, unbiased=False)[..., None]
    exact = ours.encode_image(pixels())
    centred = exact - ours.ln_vision.bias
    deviation = theirs.vision_model(pixels()).last_hidden_state - exact
    predicted = centred * 4.5e-6 / variance
    assert_close(deviation, predicted, atol=3e-6, rtol=0)
    assert load_stage1(tmp_path).ln_vision.eps == 1e-5


def stage2_models_agree(ours, theirs, is_t5):
    ids = torch.randint(4, 50, (3, 5), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids, dtype=torch.bool)
    full = torch.cat((torch.full((3, NUM_QUERIES), IMAGE_TOKEN), ids), dim=1)
    prefix = ours.soft_prompt(pixels())
    if is_t5:
        logits = ours.llm.suffix_logits(prefix, ids, real, ids, real)
        expected = theirs(
            pixel_values=pixels(),
            input_ids=full,
            decoder_input_ids=torch.cat((torch.zeros(3, 1, dtype=torch.long), ids[:, :-1]), dim=1),
        ).logits
    else:
        logits = ours.llm.causal_logits(prefix, ids, real)
        expected = theirs(pixel_values=pixels(), input_ids=full).logits[:, NUM_QUERIES - 1 : -1]
    assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("llm", [opt_config, t5_config, qwen_config], ids=["opt", "t5", "qwen2"])
def test_stage_2_of_transformers_gives_its_logits(llm, tmp_path):
    theirs = their_model(llm())
    theirs.vision_model.post_layernorm.eps = 1e-6
    theirs.save_pretrained(tmp_path)
    stage2_models_agree(load_stage2(tmp_path), theirs, llm is t5_config)


@pytest.mark.parametrize("llm", [opt_config, t5_config, qwen_config], ids=["opt", "t5", "qwen2"])
def test_transformers_loads_our_stage_2_with_its_logits(llm, tmp_path):
    ours = shake(our_model(llm()))
    ours.ln_vision.eps = 1e-6
    save_stage2(ours, tmp_path, image_token_id=IMAGE_TOKEN)
    theirs, report = Blip2ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stage2_models_agree(ours, theirs.eval(), llm is t5_config)
    equal_states(load_stage2(tmp_path), ours)


def test_tied_weights_are_written_once(tmp_path):
    ours = our_model(t5_config())
    save_stage2(ours, tmp_path, image_token_id=IMAGE_TOKEN)
    names = load_file(tmp_path / "model.safetensors").keys()
    embeddings = [name for name in names if "shared" in name or "embed_tokens" in name]
    assert embeddings == ["language_model.shared.weight"]
    assert "language_model.lm_head.weight" not in names
    equal_states(load_stage2(tmp_path), ours)


def test_a_head_that_is_not_the_embedding_stays_its_own(tmp_path):  # FlanT5
    ours = our_model(t5_config())
    ours.llm.untie_head()
    shake(ours)
    ours.ln_vision.eps = 1e-6
    assert not torch.equal(ours.llm.model.lm_head.weight, ours.llm.model.shared.weight)
    save_stage2(ours, tmp_path, image_token_id=IMAGE_TOKEN)
    again = load_stage2(tmp_path)
    equal_states(again, ours)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    stage2_models_agree(again, theirs, is_t5=True)


def test_tensors_that_differ_cannot_become_one():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    model["b"] = model["a"]
    weights = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"b.weight differs from a.weight, but the model"):
        load_strictly(model, weights)


def test_stage_2_needs_an_image_token_that_the_llm_has(tmp_path):
    for token in (None, 320):
        with pytest.raises(ValueError, match=f"image_token_id is {token}"):
            save_stage2(our_model(opt_config()), tmp_path, image_token_id=token)


def test_a_clip_tower_has_no_place_in_transformers_blip2(tmp_path):
    with pytest.raises(ValueError, match="save it in LAVIS names"):
        save_stage1(our_stage1(CLIP), tmp_path)


def test_sharded_weights_are_read_whole(their_captioner, tmp_path):
    their_captioner.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    captioners_agree(load_captioner(tmp_path), their_captioner)


def test_a_saved_folder_forgets_what_stood_beside_another_model(tmp_path):
    save_stage1(our_stage1(), tmp_path)
    save_stage2(our_model(opt_config()), tmp_path, image_token_id=IMAGE_TOKEN)
    assert not (tmp_path / OURS_ALONE).exists()


# --- LAVIS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_frozen", [True, False])
@pytest.mark.parametrize("vision", [VISION, CLIP], ids=["eva", "clip"])
def test_13_stage_1_returns_unchanged_from_a_file_of_lavis(vision, with_frozen, tmp_path):
    ours, again = our_stage1(vision), our_stage1(vision, seed=1)
    lavis_files.save_stage1(ours, tmp_path / "a.safetensors", with_frozen=with_frozen)
    theirs = load_file(tmp_path / "a.safetensors")
    words = theirs["Qformer.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(theirs["Qformer.cls.predictions.decoder.weight"], words)
    assert any(name.startswith("visual_encoder.") for name in theirs) == with_frozen
    theirs["Qformer.bert.embeddings.position_ids"] = torch.arange(10)[None]
    torch.save({"model": theirs, "epoch": 3}, tmp_path / "a.pth")
    if not with_frozen:
        again.image_encoder.load_state_dict(ours.image_encoder.state_dict())
    lavis_files.load_stage1(again, tmp_path / "a.pth")
    equal_states(again, ours)


@pytest.mark.parametrize("llm", [opt_config, t5_config], ids=["opt", "t5"])
def test_13_stage_2_returns_unchanged_from_a_whole_file_of_lavis(llm, tmp_path):
    ours = our_model(llm())
    if llm is t5_config:
        ours.llm.untie_head()  # as FlanT5's
    lavis_files.save_stage2(shake(ours), tmp_path / "a.safetensors", with_frozen=True)
    again = our_model(llm())
    lavis_files.load_stage2(again, tmp_path / "a.safetensors")
    equal_states(again, ours)


@pytest.mark.parametrize("llm", [opt_config, t5_config], ids=["opt", "t5"])
def test_13_stage_2_returns_unchanged_from_a_file_of_what_learned(llm, tmp_path):
    ours = shake(our_model(llm()))
    lavis_files.save_stage2(ours, tmp_path / "a.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    assert not [name for name in theirs if "_model" in name or "visual_encoder" in name]
    again = our_model(llm())
    for part in ("llm", "image_encoder"):
        getattr(again, part).load_state_dict(getattr(ours, part).state_dict())
    lavis_files.load_stage2(again, tmp_path / "a.safetensors")
    equal_states(again, ours)


def test_stage_2_starts_from_a_stage_1_file_of_lavis(tmp_path):
    stage1 = our_stage1()
    lavis_files.save_stage1(stage1, tmp_path / "a.safetensors")
    model = our_model(opt_config())
    model.load_stage1(lavis_files.stage1_weights(tmp_path / "a.safetensors"))
    assert torch.equal(model.qformer.query_tokens, stage1.qformer.query_tokens)


def test_a_tower_that_is_half_there_is_an_error(tmp_path):
    ours = our_stage1()
    lavis_files.save_stage1(ours, tmp_path / "a.safetensors", with_frozen=True)
    theirs = load_file(tmp_path / "a.safetensors")
    del theirs["visual_encoder.blocks.0.mlp.fc1.weight"]
    save_file(theirs, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"image_encoder.layers.\*.mlp.up.weight"):
        lavis_files.load_stage1(ours, tmp_path / "a.safetensors")


def test_tied_tensors_that_differ_are_an_error(tmp_path):
    lavis_files.save_stage1(our_stage1(), tmp_path / "a.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    theirs["Qformer.cls.predictions.decoder.bias"] += 1
    save_file(theirs, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="differ, but should be one"):
        lavis_files.stage1_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("vision", "format"), [(VISION, EVA_VIT), (CLIP, CLIP_VIT)])
def test_a_towers_own_file_is_read_up_to_the_last_block_that_is_kept(vision, format, tmp_path):
    deep = shake(ImageEncoder(replace(vision, num_layers=3)))
    torch.save(vision_to_theirs(deep.state_dict(), format), tmp_path / "tower.pth")
    kept = FrozenImageEncoder(vision)
    lavis_files.load_image_encoder(kept, tmp_path / "tower.pth", format)
    expected = {n: t for n, t in deep.state_dict().items() if not n.startswith("layers.2.")}
    assert all(torch.equal(tensor, expected[n]) for n, tensor in kept.state_dict().items())


def test_positions_are_interpolated_only_when_asked(tmp_path):
    small, large = our_stage1(), our_stage1(replace(VISION, image_size=32))
    lavis_files.save_stage1(small, tmp_path / "a.safetensors", with_frozen=True)
    with pytest.raises(CheckpointError, match=r"is \(1, 5, 24\), the model has \(1, 17, 24\)"):
        lavis_files.load_stage1(large, tmp_path / "a.safetensors")
    lavis_files.load_stage1(large, tmp_path / "a.safetensors", resizes_positions=True)
    assert torch.equal(large.image_encoder.positions[:, 0], small.image_encoder.positions[:, 0])


# --- Errors and hostile files ---------------------------------------------------------------------


def test_d15_a_report_lists_missing_unexpected_and_misshapen_and_loads_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = model[0].weight.clone()
    weights = dict(model.state_dict(), **{"0.weight": torch.ones(2, 2), "1.bias": torch.ones(3)})
    weights["1.weights"] = weights.pop("1.weight")
    with pytest.raises(CheckpointError) as error:
        load_strictly(model, weights, source="a.pth")
    assert str(error.value) == (
        "a.pth do not fit the model; nothing was loaded\n  missing:\n  1.weight\n"
        "  unexpected:\n  1.weights; did you mean 1.weight?\n"
        "  of another kind:\n  1.bias is (3,), the model has (2,)"
    )
    assert torch.equal(model[0].weight, before)


def test_many_names_are_grouped_by_layer():
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 1)})
    weights = {f"layers.{n}.norm.weight": torch.ones(1) for n in range(12)}
    with pytest.raises(CheckpointError, match=r"layers\.\*\.norm\.weight \(12 of them\)"):
        load_strictly(layers, weights)


def test_only_missing_names_with_a_reason_are_allowed():
    model = torch.nn.Linear(2, 2)
    load_strictly(model, {"weight": torch.ones(2, 2)}, may_lack={"bias": "it starts at zero"})
    assert torch.equal(model.weight, torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="missing"):
        load_strictly(model, {"weight": torch.ones(2, 2)}, may_lack={"bi": "not all of the name"})


class Bomb:
    """Code that an unwary reader of a pickle would run: it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "it ran"
    for content in ({"model": Bomb(trace)}, Bomb(trace)):
        (tmp_path / "a.pth").write_bytes(pickle.dumps(content, protocol=2))
        torch.save(content, tmp_path / "b.pth")
        for name in ("a.pth", "b.pth"):
            with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
                read_weights(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "no weights by name"),
        ({"model": [1]}, "no weights by name"),
        ({"model": {"a": 1}}, "'a', which is no named tensor"),
        ({1: torch.ones(1)}, "1, which is no named tensor"),
        ({"a": torch.ones(1).expand(2**40)}, "claims"),
        ({"a": torch.ones(2, 2).to_sparse()}, "no plain tensor"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "place", ["../elsewhere.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", ""]
)
def test_an_index_cannot_name_a_file_elsewhere(place, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(CheckpointError, match="no file beside it"):
        read_weights(folder)


def test_an_index_and_its_files_have_to_agree(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="differ in a, b"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_weights(tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_weights(tmp_path)


def test_broken_and_absent_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(CheckpointError, match="has neither"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        read_weights(tmp_path / "nowhere.pth")


def test_a_config_of_another_model_or_of_absurd_size_is_refused(their_captioner, tmp_path):
    their_captioner.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'blip', not of 'blip-2'"):
        load_stage2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layers 1000000000"):
        load_captioner(tmp_path)
    config["text_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing"):
        load_captioner(tmp_path)


def test_d30_new_queries_and_towers_are_not_transformers_zeros():
    model = our_model(opt_config())
    assert model.qformer.query_tokens.std() > 0.01
    assert model.image_encoder.patches.weight.std() > 0.01
