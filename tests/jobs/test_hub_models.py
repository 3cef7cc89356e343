"""Models of the hub are named with a commit, or somebody is told that they may change."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast, OPTConfig, OPTForCausalLM

import jobs.cli
from jobs.hub_models import hub_models, unpinned
from jobs.recipe import load_recipe
from jobs.training.context import TrainContext
from jobs.training.data import open_tokenizer
from jobs.training.job import training_job
from model.llm import load_llm

CLUSTER = Path(__file__).parents[2] / "ray_cluster.yaml"
OLD, NEW = "a" * 40, "b" * 40
RECIPE = """\
name: pets
root: {folder}/corpus
sources: [{{name: cats, format: cc3m, paths: [{folder}/cats.tsv]}}]
captioner: {{name: owner/captioner, revision: main}}
scorer: {{filter: null, clip: {{name: owner/clip, revision: {commit}}}}}
score: {{dtype: bfloat16}}
select: {{policy: blip2}}
training:
  tokenizer: owner/bert
  revisions: {{owner/bert: {commit}}}
  stage1: {{preset: tiny, text_model: owner/bert}}
  stage2: {{preset: tiny, llm: owner/opt}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "cats.tsv").write_text("a cat\thttp://127.0.0.1:1/a.jpg\n")
    path = tmp_path / "pets.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, commit=OLD))
    return str(path)


def told(models):
    return [line.partition(" = ")[0] for line in unpinned(models)]


def test_what_is_no_commit_is_told_with_the_key_that_pins_it(recipe):
    models = hub_models(load_recipe(recipe))
    assert told(models) == ["captioner.name", "training.stage2.llm"]
    lines = list(unpinned(models))
    assert lines[0].endswith("revision 'main', so the hub may give other weights another day; "
                             "pin it to a commit: captioner.revision")  # fmt: skip
    assert "owner/opt: no revision" in lines[1]
    assert "training.revisions" in lines[1]


def test_only_what_a_command_takes_from_the_hub_is_told(recipe):
    assert told(hub_models(load_recipe(recipe), ())) == ["captioner.name"]
    assert told(hub_models(load_recipe(recipe), ("stage1",))) == ["captioner.name"]


def test_folders_and_a_runs_own_models_come_from_nowhere(recipe, tmp_path):
    own = ["captioner={name: trained}", f"scorer.clip={{name: '{tmp_path}'}}"]
    own += ["training.tokenizer=corpus", "training.revisions={}"]
    own += [f"training.stage1.text_model='{tmp_path}'", f"training.stage2.llm='{tmp_path}'"]
    assert hub_models(load_recipe(recipe, own)) == []


@pytest.mark.parametrize("command", ["run", "plan"])
def test_run_and_plan_tell_it_before_anything_is_made(command, recipe, capsys):
    more = ["--cluster", str(CLUSTER)] if command == "plan" else ["--set", "run.engine=local"]
    with pytest.raises(SystemExit):
        jobs.cli.main([command, recipe, *more])
    assert "captioner.name = owner/captioner: revision 'main'" in capsys.readouterr().err


def put(cache, name, folders, main):
    """Lay a repository out as `hf download` leaves it: `folders` by commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit, folder in folders.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(main)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def save_tokenizer(folder, *words):
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def test_a_tokenizer_is_that_of_its_revision(recipe, cache, tmp_path):
    save_tokenizer(tmp_path / "old", "cat")
    save_tokenizer(tmp_path / "new", "cat", "dog", "owl")
    put(cache, "owner/bert", {OLD: tmp_path / "old", NEW: tmp_path / "new"}, main=NEW)
    context = TrainContext(torch.device("cpu"))
    pinned = training_job(load_recipe(recipe), "stage1")
    newest = training_job(load_recipe(recipe, ["training.revisions={}"]), "stage1")
    assert open_tokenizer(pinned, context).num_plain == 6
    assert open_tokenizer(newest, context).num_plain == 8


def test_a_language_model_is_that_of_its_revision(cache, tmp_path):
    config = OPTConfig(
        vocab_size=32, hidden_size=8, word_embed_proj_dim=8, ffn_dim=8,
        num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    weights = {}
    for commit in (OLD, NEW):
        model = OPTForCausalLM(config)
        model.save_pretrained(tmp_path / commit)
        weights[commit] = model.model.decoder.embed_tokens.weight
    put(cache, "owner/opt", {each: tmp_path / each for each in (OLD, NEW)}, main=NEW)
    for revision, commit in ((OLD, OLD), (None, NEW)):
        llm = load_llm("owner/opt", dtype=torch.float32, revision=revision)
        assert torch.equal(llm.model.get_input_embeddings().weight, weights[commit])
