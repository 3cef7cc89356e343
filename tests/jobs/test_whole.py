"""The whole job over 160 images with tiny models: every step, in order, and its results."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

import jobs.cli
from jobs.ablate import ablate, arm_policy
from jobs.demo.job import Extent, demo_recipe
from jobs.demo.plan import WebConfig
from jobs.demo.web import build_web
from jobs.errors import UserError
from jobs.evaluate import evaluate
from jobs.evaluation.config import ARMS
from jobs.recipe import dump_recipe, load_recipe
from jobs.stages.stages import untrained
from jobs.training.config import TrainingConfig
from jobs.whole import blip2_stages, run_whole, train
from model.checkpoints import load_captioner, load_filter, load_stage1
from pipeline.corpus import Corpus
from pipeline.selection.config import Policy
from pipeline.verify import verify


def never():
    return False


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    config = WebConfig(num_web=100, num_human=40, num_test=20, port=0)
    return build_web(tmp_path_factory.mktemp("web"), config)


@pytest.fixture(scope="module")
def recipe(web, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "corpus"
    lists = {name: getattr(web.lists, name) for name in ("laion", "cc3m", "human", "test")}
    tiny = {"preset": "tiny", "num_steps": 6, "global_batch_size": 8, "num_frozen_layers": 0}
    stages = {
        "med": tiny | {"image_encoder": "random", "queue_size": 32},
        "captioner": tiny,
        "filter": tiny | {"queue_size": 32},
        "stage1": tiny | {"image_encoder": "trained"},
        "stage2": tiny | {"llm": "null"},  # the preset's own, which has random weights
    }
    training = {
        f"training.{stage}.{key}": value
        for stage, section in stages.items()
        for key, value in section.items()
    }
    overrides = [f"sources.{name}.paths=[{str(path)!r}]" for name, path in lists.items()]
    overrides += [f"{key}={value}" for key, value in training.items()]
    overrides += [
        f"root={str(root)!r}",
        f"fetch.allowed_ports=[{web.port}]",
        "select.itm_threshold=0.1",
        "evaluation.num_candidates=5",
        "run.has_report=true",
    ]
    return load_recipe(str(files("jobs") / "recipes" / "demo.yaml"), overrides)


@pytest.fixture(scope="module")
def done(web, recipe):
    torch.set_num_threads(1)
    assert untrained(recipe) == ["captioner", "filter"]
    with web.serve():
        return run_whole(recipe, never)


def exported(root, stage):
    """Return the bytes of the weights that a stage handed over, by file."""
    paths = Path(root, "train", stage, "export").rglob("*.safetensors")
    return {path.name: path.read_bytes() for path in paths}


def capfilt(*arguments):
    with pytest.raises(SystemExit) as ended:
        jobs.cli.main([str(each) for each in arguments])
    return ended.value.code


def test_all_steps_are_done_and_nothing_is_lost(done, recipe):
    corpus = Corpus(recipe.root)
    assert done.exit_code == 0
    assert list(verify(corpus)) == []
    for source, num_rows in {"laion": 60, "cc3m": 40, "human": 40, "test": 20}.items():
        for stage in ("raw", "clean"):
            counts = [record.counts.total for record in corpus.shards(stage, source)]
            assert sum(counts) == num_rows, (stage, source)
    assert untrained(recipe) == []


def test_the_same_call_again_has_nothing_to_do(done, recipe):
    again = run_whole(recipe, never)
    assert (again.exit_code, sum(stage.num_new for stage in again.stages)) == (0, 0)
    assert again.models == done.models


def test_a_run_goes_on_to_blip2_where_the_recipe_says_so(done, recipe):
    assert set(done.models) == {"stage1", "stage2"}
    assert "CIDEr" in done.models["stage2"]
    assert blip2_stages(recipe) == ("stage1", "stage2")
    for until, stages in {"select": (), "stage1": ("stage1",)}.items():
        run = recipe.run.model_copy(update={"until": until})
        assert blip2_stages(recipe.model_copy(update={"run": run})) == stages
    empty = TrainingConfig()
    assert blip2_stages(recipe.model_copy(update={"training": empty})) == ()


def test_a_tower_that_is_not_there_stops_a_run_before_anything_is_fetched(recipe, tmp_path):
    stage1 = recipe.training.stage1.model_copy(update={"image_encoder": "eva_vit_g.pth"})
    training = recipe.training.model_copy(update={"stage1": stage1})
    root = tmp_path / "corpus"
    lacking = recipe.model_copy(update={"training": training, "root": str(root)})
    with pytest.raises(UserError, match="image_encoder = eva_vit_g.pth.*run.until=select"):
        run_whole(lacking, never)
    assert not root.exists()


def test_stages_with_other_qformers_stop_a_run_before_anything_is_fetched(recipe, tmp_path):
    stage2 = recipe.training.stage2.model_copy(update={"preset": "demo"})
    training = recipe.training.model_copy(update={"stage2": stage2})
    root = tmp_path / "corpus"
    other = recipe.model_copy(update={"training": training, "root": str(root)})
    with pytest.raises(UserError, match="stage2.preset = demo: .*stage1.preset = tiny"):
        run_whole(other, never)
    assert not root.exists()


def test_a_language_model_without_a_free_id_is_refused_before_training(done, recipe, tmp_path):
    name = str(files("jobs") / "demo" / "llm_weights")
    tokenizer = AutoTokenizer.from_pretrained(name)
    llm = AutoModelForCausalLM.from_pretrained(name)
    llm.resize_token_embeddings(len(tokenizer))
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stage2 = recipe.training.stage2.model_copy(update={"llm": str(tmp_path)})
    training = recipe.training.model_copy(update={"stage2": stage2})
    with pytest.raises(UserError, match="training.stage2.llm.*resize_token_embeddings"):
        train(recipe.model_copy(update={"training": training}), ("stage2",), never)


def test_the_page_is_there(done):
    assert Path(done.report).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("stage", "figures"),
    [
        ("stage1", {"TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "BLEU-4", "CIDEr"}),
        ("filter", {"TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"}),
        ("captioner", {"BLEU-4", "CIDEr"}),
        ("stage2", {"BLEU-4", "CIDEr"}),
    ],
)
def test_models_are_measured_on_images_that_none_has_seen(done, recipe, stage, figures):
    found = evaluate(recipe, stage)
    assert set(found.figures) == figures
    assert found.about["images"] == 20
    assert evaluate(recipe, stage).figures == found.figures
    config = recipe.evaluation.model_copy(update={"batch_size": 3})
    in_threes = evaluate(recipe.model_copy(update={"evaluation": config}), stage)
    assert in_threes.figures == pytest.approx(found.figures)


def test_a_filter_is_judged_by_labelled_captions(done, recipe, tmp_path):
    corpus, labels = Corpus(recipe.root), tmp_path / "labels.csv"
    (record,) = corpus.shards("raw", "test")
    with corpus.open(record, "parquet") as stream:
        keys = pq.read_table(stream, columns=["key"])["key"].to_pylist()
    rows = [f"{key},{text},{int(text != 'a lie')}" for key in keys for text in ("a star", "a lie")]
    labels.write_text("\n".join(["key,caption,is_match", *rows]) + "\n")
    config = recipe.evaluation.model_copy(update={"labels": str(labels)})
    found = evaluate(recipe.model_copy(update={"evaluation": config}), "filter")
    assert found.to_json()["filter"]["pairs"] == 2 * len(keys)
    assert {"ITM AUC", "ITC AUC", "TR@1"} <= found.figures.keys()
    assert "precision" in found.text()


def test_what_is_not_trained_cannot_be_measured(recipe, tmp_path):
    elsewhere = recipe.model_copy(update={"root": str(tmp_path)})
    with pytest.raises(UserError, match=re.escape("capfilt pretrain RECIPE --stage stage1")):
        evaluate(elsewhere, "stage1")


def test_arms_are_trained_alike_on_images_that_are_linked(done, recipe):
    found = ablate(recipe, never)
    assert [each.arm for each in found.results] == ["web", "capfilt"]
    assert {len(values) for each in found.results for values in each.figures.values()} == {1}
    arm = Path(recipe.root, "ablation", "web-0")
    assert not (arm / "clean" / "human").exists()
    assert not (arm / "clean" / "test").exists()
    own, first = (f / "raw" / "laion" / "00000.tar" for f in (arm, Path(recipe.root)))
    assert own.stat().st_ino == first.stat().st_ino
    written = json.loads(Path(recipe.root, "report", "ablation.json").read_text())
    assert [row["arm"] for row in written["rows"]] == ["web", "capfilt"]
    assert ablate(recipe, never).to_json() == found.to_json()  # nothing is trained twice


def test_a_submitted_run_trains_its_own_models_too(done, web, recipe, tmp_path):
    """And one after the other they are the same, to the bit, as side by side."""
    assert recipe.training.num_at_once > 1
    in_turn = recipe.training.model_copy(update={"num_at_once": 1})
    elsewhere = recipe.model_copy(update={"root": str(tmp_path / "corpus"), "training": in_turn})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(elsewhere))
    with web.serve():
        assert capfilt("run-submitted", tmp_path / "recipe.yaml", "--again", "as typed") == 0
    assert untrained(elsewhere) == []
    assert Corpus(elsewhere.root).shards("clean", "laion")
    for stage in ("captioner", "filter"):
        ours, theirs = (exported(root, stage) for root in (elsewhere.root, recipe.root))
        assert ours == theirs, stage


def test_an_arms_policy_is_the_one_it_is_named_for(recipe):
    policies = [
        arm_policy(recipe, arm).policy for arm in ("web", "filtered", "captioned", "capfilt")
    ]
    assert policies == [Policy.WEB_ONLY, Policy.FILTER_ONLY, Policy.CAPTION_ONLY, Policy.BLIP]


def test_a_full_demo_goes_on_from_a_usual_one(web, tmp_path):
    usual, full = (demo_recipe(tmp_path, web, extent) for extent in (Extent.USUAL, Extent.FULL))
    assert (usual.ablation.arms, usual.ablation.seeds) == (("web", "capfilt"), (0,))
    assert (full.ablation.arms, full.ablation.seeds) == (ARMS, (0, 1, 2))
    assert full.model_copy(update={"ablation": usual.ablation}) == usual
    assert capfilt("demo", "--quick", "--full", "--root", tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


def test_exports_are_what_transformers_loads(done, recipe, tmp_path):
    for stage in ("captioner", "filter", "stage1"):
        assert capfilt("export", recipe.root, "--stage", stage, "--out", tmp_path / stage) == 0
        card = (tmp_path / stage / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "6 steps" in card
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner").eval()
    ours = load_captioner(tmp_path / "captioner")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.vision_model(pixels).last_hidden_state,
            ours.image_encoder(pixels),
            atol=1e-4,
            rtol=1e-4,
        )
        matcher = BlipForImageTextRetrieval.from_pretrained(tmp_path / "filter").eval()
        mine = load_filter(tmp_path / "filter")
        torch.testing.assert_close(
            matcher.vision_model(pixels).last_hidden_state,
            mine.encode_image(pixels),
            atol=1e-4,
            rtol=1e-4,
        )
    assert Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "stage1").eval() is not None
    assert load_stage1(tmp_path / "stage1").config.qformer.num_queries == 8


def test_lavis_names_are_one_file_and_a_folder_in_use_is_refused(done, recipe, tmp_path, capsys):
    out = tmp_path / "qformer"
    assert capfilt("export", recipe.root, "--stage", "stage1", "--to", "lavis", "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "lavis.safetensors"]
    assert capfilt("export", recipe.root, "--stage", "stage1", "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_samples_story_and_the_report_are_told(done, recipe, capsys):
    assert capfilt("why", recipe.root, "00000003", "--source", "laion") == 0
    story = capsys.readouterr().out
    assert "/laion/" in story or "http" in story
    assert capfilt("why", recipe.root, "999999999") == 2
    assert capfilt("report", recipe.root, "--json") == 0
    page = json.loads(capsys.readouterr().out.partition("\n}")[0] + "\n}")["page"]
    assert Path(page).read_text().startswith("<!doctype html>")
