"""Models are found by name, told apart by bytes, and fed what transformers would feed them."""

import json
import os
import shutil

import blip_folders
import hub_cache
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.checkpoints import load_captioner
from pipeline.captioner import Captioner
from pipeline.model_configs import CaptionerConfig, ScorerConfig
from pipeline.models import (
    ImagePreprocessor,
    ModelConfig,
    ModelError,
    bert_tokenizer,
    resolve_model,
    weights_fingerprint,
    with_commit,
)
from pipeline.scorer import Scorer

OLD_COMMIT, NEW_COMMIT = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "captioner"
    blip_folders.save_captioner(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def med_of(folder):
    return load_captioner(folder).text.config


# --- names ----------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(folder):
    assert resolve_model(ModelConfig(name=str(folder))) == folder


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ModelError, match="no revisions, but main is set"):
        resolve_model(ModelConfig(name=str(folder), revision="main"))


def test_a_name_that_is_nowhere_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"nobody/nothing at v1 is not on this machine.*hf downl"):
        resolve_model(ModelConfig(name="nobody/nothing", revision="v1"))


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache that holds two commits of one name, which differ in their weights."""
    blip_folders.save_captioner(tmp_path / "new", seed=1)
    hub_cache.put(
        tmp_path / "hub",
        "owner/captioner",
        {OLD_COMMIT: folder, NEW_COMMIT: tmp_path / "new"},
        main=NEW_COMMIT,
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_name_on_the_hub_has_the_weights_of_its_revision(hub, folder):
    pinned = ModelConfig(name="owner/captioner", revision=OLD_COMMIT)
    assert weights_fingerprint(resolve_model(pinned)) == weights_fingerprint(folder)
    newest = resolve_model(ModelConfig(name="owner/captioner"))
    assert weights_fingerprint(newest) != weights_fingerprint(folder)


def test_a_branch_is_resolved_to_the_commit_that_it_stands_for(hub, folder):
    assert with_commit(ModelConfig(name="owner/captioner")).revision == NEW_COMMIT
    assert with_commit(ModelConfig(name="owner/captioner", revision="main")).revision == NEW_COMMIT
    pinned = ModelConfig(name="owner/captioner", revision=OLD_COMMIT)
    assert with_commit(pinned) == pinned
    local = ModelConfig(name=str(folder))
    assert with_commit(local) == local


def test_a_loaded_captioner_knows_its_commit(hub):
    captioner = Captioner.load(CaptionerConfig(name="owner/captioner"), seed=0)
    assert captioner.config.revision == NEW_COMMIT
    assert captioner.config.name == "owner/captioner"


def test_a_loaded_scorer_knows_the_commits_of_its_models(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    blip_folders.save_filter(tmp_path / "filter")
    blip_folders.save_clip(tmp_path / "clip")
    hub_cache.put(tmp_path / "hub", "a/filter", {OLD_COMMIT: tmp_path / "filter"}, main=OLD_COMMIT)
    hub_cache.put(tmp_path / "hub", "a/clip", {NEW_COMMIT: tmp_path / "clip"}, main=NEW_COMMIT)
    asked = ScorerConfig(filter=ModelConfig(name="a/filter"), clip=ModelConfig(name="a/clip"))
    config = Scorer.load(asked).config
    assert (config.filter.revision, config.clip.revision) == (OLD_COMMIT, NEW_COMMIT)
    assert config.content() == asked.content()


def test_what_is_no_name_is_refused():
    with pytest.raises(ModelError, match="neither a folder nor a name on the hub"):
        resolve_model(ModelConfig(name="no//such name"))


def test_a_folder_without_safetensors_is_refused_whatever_else_it_holds(copy):
    os.rename(copy / "model.safetensors", copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="has no safetensors, and nothing else is read"):
        resolve_model(ModelConfig(name=str(copy)))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(ModelConfig(name=str(tmp_path)))


# --- fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_bytes_and_not_of_the_place(folder, copy):
    assert weights_fingerprint(copy) == weights_fingerprint(folder)
    assert len(weights_fingerprint(copy)) == 16
    (copy / "README.md").write_text("a note")
    assert weights_fingerprint(copy) == weights_fingerprint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_byte_changes_the_fingerprint(folder, copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    assert weights_fingerprint(copy) != weights_fingerprint(folder)


def test_files_that_change_names_change_the_fingerprint(folder, copy):
    os.rename(copy / "vocab.txt", copy / "words.txt")
    assert weights_fingerprint(copy) != weights_fingerprint(folder)


# --- tokenizers -----------------------------------------------------------------------------------


def test_berts_own_tokenizer_serves_where_blips_tokens_come_right_behind_it(folder):
    assert len(bert_tokenizer(folder, med_of(folder)).get_vocab()) == 100


def test_a_tokenizer_with_blips_tokens_serves(copy):
    blip_folders.save_bert_tokenizer(copy, extra=("[DEC]", "[ENC]"))
    vocabulary = bert_tokenizer(copy, med_of(copy)).get_vocab()
    assert (vocabulary["[DEC]"], vocabulary["[ENC]"]) == (100, 101)


def test_a_tokenizer_of_another_size_is_refused(copy):
    blip_folders.save_bert_tokenizer(copy, size=90)
    with pytest.raises(ModelError, match=r"has 90 tokens and no \[DEC\].* has as 100"):
        bert_tokenizer(copy, med_of(copy))


def test_a_tokenizer_with_blips_tokens_elsewhere_is_refused(copy):
    blip_folders.save_bert_tokenizer(copy, extra=("[ENC]", "[DEC]"))
    with pytest.raises(ModelError, match=r"has \[DEC\] as 101, the model as 100"):
        bert_tokenizer(copy, med_of(copy))


def test_a_folder_without_a_tokenizer_is_refused(copy):
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="has no BERT tokenizer"):
        bert_tokenizer(copy, load_captioner(copy).text.config)


# --- images ---------------------------------------------------------------------------------------


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99))
def test_blips_images_equal_transformers_bit_for_bit(height, width, seed):
    pixels = picture(height, width, seed)
    theirs = BlipImageProcessorPil(size={"height": 24, "width": 24})
    expected = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImagePreprocessor(24)(pixels), expected)


@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99))
def test_clips_images_equal_transformers_bit_for_bit(height, width, seed):
    pixels = picture(height, width, seed)
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    expected = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImagePreprocessor(24, is_middle_cut=True)(pixels), expected)


def test_a_folder_says_by_what_its_images_are_normalised(copy):
    plain = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
    (copy / "preprocessor_config.json").write_text(json.dumps(plain))
    white = np.full((9, 9, 3), 255, np.uint8)
    expected = torch.tensor([2.0, 1.0, 1.0])[:, None, None].expand(3, 8, 8)
    assert torch.equal(ImagePreprocessor.of_folder(copy, 8)(white), expected)
    os.rename(copy / "preprocessor_config.json", copy / "processor_config.json")
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": plain}))
    assert torch.equal(ImagePreprocessor.of_folder(copy, 8)(white), expected)


def test_a_folder_that_normalises_one_channel_is_refused(copy):
    (copy / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(ModelError, match="three channels are needed"):
        ImagePreprocessor.of_folder(copy, 8)
