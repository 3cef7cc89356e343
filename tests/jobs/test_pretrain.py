"""Training from shards to exports: five stages, bad input, damaged samples, the command."""

import json
import logging
import math
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_jobs import (
    HUMAN,
    NUM_STEPS,
    alone,
    config,
    human_item,
    job,
    photo,
    records,
    web_item,
    write_corpus,
)
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from jobs import cli
from jobs.errors import RunError, UserError
from jobs.pretrain import pretrain
from jobs.training.context import TrainContext
from jobs.training.data import cut, loader_config
from jobs.training.exports import read_card
from jobs.training.gates import DivergedError
from pipeline.corpus import Corpus
from pipeline.download_row import RAW_SCHEMA
from pipeline.ledger import LedgerWriter
from pipeline.loader import Loader, LoaderConfig
from pipeline.tar import TarWriter

STAGES = ("med", "captioner", "filter", "stage1", "stage2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A root in which all stages were trained."""
    root = tmp_path_factory.mktemp("trained") / "corpus"
    write_corpus(root)
    for stage in STAGES:
        alone(job(root, stage))
    return root


@pytest.fixture
def corpus_only(trained, tmp_path):
    """A root with the same corpus in which nothing was trained."""
    root = tmp_path / "corpus"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("train"))
    return root


# --- what training leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_records_with_losses_probes_and_pace(trained, stage):
    rows = [json.loads(line) for line in (trained / "train" / stage / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["pace"]["tflops_per_second"] > 0
    assert 0 <= rows[-1]["pace"]["data_wait_share"] <= 1
    probed = {"med": "retrieval_r1", "filter": "itm_auc", "stage1": "retrieval_r1"}
    assert 0 <= rows[-1]["probe"][probed.get(stage, "cider")] <= 10


@pytest.mark.parametrize(
    ("stage", "folder", "kind"),
    [
        ("med", "captioner", BlipForConditionalGeneration),
        ("med", "filter", BlipForImageTextRetrieval),
        ("captioner", "", BlipForConditionalGeneration),
        ("filter", "", BlipForImageTextRetrieval),
        ("stage1", "", Blip2ForImageTextRetrieval),
        ("stage2", "", Blip2ForConditionalGeneration),
    ],
)
def test_transformers_loads_every_export(trained, stage, folder, kind):
    path = trained / "train" / stage / "export" / folder
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("a text of something")["input_ids"]
    assert json.loads((path / "preprocessor_config.json").read_text())["size"]["height"] == 32


def test_trained_and_trained_again_it_is_done_at_once(trained):
    asked = []
    card = alone(job(trained, "filter"), lambda: bool(asked.append(1)))
    assert (card.step, card.stage, asked) == (NUM_STEPS, "filter", [])


def test_training_learns_what_can_be_learned(corpus_only):
    """Forty steps on a handful of captions that differ by a number: the losses must fall."""
    this = job(corpus_only, "med", {"num_steps": 40, "peak_rate": 5e-3, "augmentation": "resize"})
    alone(this)
    rows = records(this)
    assert rows[-1]["lm"] < 0.7 * rows[0]["lm"]


def test_a_stage_begins_from_the_one_before(trained):
    med, captioner = (read_card(job(trained, s).open_store(), s) for s in ("med", "captioner"))
    assert captioner.content["origins"]["start"] == med.fingerprint


def test_captioner_and_filter_learn_from_human_captions_alone(trained):
    for stage, sources in (("captioner", ["coco"]), ("filter", ["coco"]), ("stage1", [])):
        card = read_card(job(trained, stage).open_store(), stage)
        assert list(card.content["loader"]["sources"]) == sources


# --- raw shards ---------------------------------------------------------------------------------


def write_raw(root):
    """Commit a raw shard of the web, with one caption each, and a human one, with five."""
    corpus = Corpus(str(root))
    for source, make in (("web", web_item), ("coco", human_item)):
        with corpus.writer("raw", source, 0, fingerprint="raw") as writer:
            with (
                open(writer.path("tar"), "wb") as stream,
                TarWriter(stream) as tar,
                LedgerWriter(writer.path("parquet"), RAW_SCHEMA) as ledger,
            ):
                for number in range(16):
                    item = make(0, number, photo(number + (1000 if source == "coco" else 0)))
                    origin = "human" if source == "coco" else "web"
                    texts = [text for text, kind, _ in item.captions if kind == origin]
                    captions = [{"text": text, "origin": origin} for text in texts]
                    members = {"jpg": item.image, "txt": texts[0].encode()}
                    members["json"] = json.dumps({"captions": captions}).encode()
                    tar.write(item.key, members)
                    row = dict.fromkeys(RAW_SCHEMA.names)
                    row |= {"key": item.key, "source": source, "verdict": "kept", "reason": ""}
                    row |= {"caption": texts[0], "num_captions": len(texts), "origin": origin}
                    ledger.write(row | {"sha256": sha256(item.image).hexdigest()})
            writer.commit(rows_in=16, counts=ledger.counts)


def test_med_trains_on_the_web_as_it_came(tmp_path):
    write_raw(tmp_path / "corpus")
    this = job(tmp_path / "corpus", "med", med_data="raw", held_out_share=0.1)
    card = alone(this)
    assert card.content["loader"]["stage"] == "raw"
    assert math.isfinite(card.losses["loss"])


def test_captioner_and_filter_read_the_same_shards_as_med_and_blip2_the_clean_ones(tmp_path):
    stages = {
        stage: [
            loader_config(job(tmp_path, stage, med_data=data), 8).stage for data in ("raw", "clean")
        ]
        for stage in STAGES
    }
    assert stages == dict.fromkeys(("med", "captioner", "filter"), ["raw", "clean"]) | (
        dict.fromkeys(("stage1", "stage2"), ["clean", "clean"])
    )


def test_raw_shards_give_every_human_caption_and_the_webs_one(tmp_path):
    write_raw(tmp_path / "corpus")
    options = LoaderConfig(stage="raw", global_batch_size=16, image_size=32, num_workers=0)
    with Loader(Corpus(str(tmp_path / "corpus")), options) as loader:
        assert loader.index.num_records == 16 + 5 * 16
        batches = [next(loader) for _ in range(6)]
    texts = {text for batch in batches for text in batch.texts}
    assert {f"text {number} of 000000003" for number in range(5)} <= texts
    assert "web text of 000000003" in texts


# --- bad input ----------------------------------------------------------------------------------


def test_a_root_without_shards_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"no committed clean shard.*capfilt run"):
        alone(job(tmp_path, "med"))
    with pytest.raises(UserError, match=r"no committed raw shard.*capfilt download"):
        alone(job(tmp_path, "med", med_data="raw"))


def test_fewer_samples_than_a_batch_say_so(corpus_only):
    with pytest.raises(UserError, match="fewer than one global batch of 4,096"):
        alone(job(corpus_only, "med", {"global_batch_size": 4096, "queue_size": 4096}))


@pytest.mark.parametrize(
    ("stage", "before"), [("captioner", "med"), ("filter", "med"), ("stage2", "stage1")]
)
def test_without_the_stage_before_it_says_which_to_run(corpus_only, stage, before):
    with pytest.raises(UserError, match=f"begins from {before}.*--stage {before}"):
        alone(job(corpus_only, stage))


def test_a_changed_export_of_the_stage_before_is_not_trained_on(trained, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(trained, root)
    shutil.rmtree(root / "train" / "captioner")
    weights = root / "train/med/export/captioner/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"captioner/model.safetensors is not the file"):
        alone(job(root, "captioner"))


def test_a_recipe_without_human_captions_is_told_what_captioner_and_filter_need(corpus_only):
    this = replace(job(corpus_only, "filter"), human_sources=())
    with pytest.raises(UserError, match="filter is fine-tuned on human captions"):
        alone(this)


def test_stage1_asks_for_its_image_encoder(corpus_only):
    with pytest.raises(UserError, match="set training.stage1.image_encoder to"):
        alone(job(corpus_only, "stage1", {"image_encoder": None}))


def test_a_checkpoint_of_another_recipe_is_refused_with_the_keys(corpus_only):
    answers = iter([False, False, True])
    assert alone(job(corpus_only, "med"), lambda: next(answers)) is None
    with pytest.raises(UserError, match="recipe.peak_rate: absent then, 0.002 now") as raised:
        alone(job(corpus_only, "med", {"peak_rate": 2e-3}))
    assert "00000003" in str(raised.value)
    assert f"to begin anew, delete {corpus_only}/train/med" in str(raised.value)


def test_a_tokenizer_that_lacks_a_special_token_stops_before_training(corpus_only, tmp_path):
    lacking = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "a": 3})
    lacking.cls_token = None
    lacking.save_pretrained(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer/tokenizer_config.json"
    found = json.loads(settings.read_text())
    settings.write_text(json.dumps(found | {"cls_token": None}))
    with pytest.raises(UserError, match=r"it has no \[CLS\]"):
        alone(job(corpus_only, "med", tokenizer=str(tmp_path / "tokenizer")))
    assert not (corpus_only / "train/med").exists()


def test_a_queue_that_the_batch_does_not_divide_is_refused_before_the_first_step(corpus_only):
    with pytest.raises(UserError, match="queue_size 30 is not a multiple of the global batch"):
        alone(job(corpus_only, "med", {"queue_size": 30}))


@pytest.mark.parametrize(
    ("world_size", "micro", "words"),
    [(3, None, "cannot be shared equally by 3 workers"), (2, 3, "no multiple of training.med")],
)
def test_a_batch_that_cannot_be_cut_is_refused(tmp_path, world_size, micro, words):
    this = job(tmp_path, "med", {"micro_batch_size": micro})
    with pytest.raises(UserError, match=words):
        cut(this, 8, TrainContext(torch.device("cpu"), 0, world_size))


def test_a_loss_that_is_not_finite_ends_training_with_advice(corpus_only):
    with pytest.raises(DivergedError, match="Lower peak_rate"):
        alone(beginning_with_infinity(corpus_only))


def test_whoever_trains_is_told_where_a_loss_is_not_finite(corpus_only):
    diverging = beginning_with_infinity(corpus_only)
    with pytest.raises(RunError, match=r"not finite since step.*Lower peak_rate") as told:
        pretrain(diverging, lambda: False)
    assert str(told.value).startswith(f"{diverging.root}/train/{diverging.stage}: ")


def beginning_with_infinity(root):
    alone(job(root, "med"))
    broken = root / "broken"
    shutil.copytree(root / "train/med/export/captioner", broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = torch.full_like(weights[name], torch.inf)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return job(root, "captioner", {"start_from": str(broken)})


# --- damaged samples ----------------------------------------------------------------------------


def test_damaged_samples_in_the_middle_never_stop_training(corpus_only, caplog):
    tar = corpus_only / "clean/web/00000.tar"
    data = bytearray(tar.read_bytes())
    start = data.find(b"\xff\xd8\xff", len(data) // 2)
    data[start : start + 400] = bytes(400)
    tar.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        card = alone(job(corpus_only, "med"))
    assert card.step == NUM_STEPS
    assert "stands in for it" in caplog.text


# --- the command --------------------------------------------------------------------------------


def recipe(root, folder):
    path = Path(folder) / "recipe.yaml"
    lists = Path(folder) / "list.csv"
    lists.write_text("url,caption\n")
    sources = [
        {"name": "web", "format": "table", "paths": [str(lists)]},
        {"name": HUMAN[0], "format": "table", "paths": [str(lists)], "origin": "human"},
    ]
    training = config().model_dump(mode="json", exclude_none=True)
    document = {"name": "test", "root": str(root), "seed": 0, "sources": sources}
    path.write_text(yaml.safe_dump(document | {"training": training}))
    return str(path)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments])
    return ended.value.code, capsys.readouterr()


def test_the_command_trains_a_stage_and_tells_where_it_is(trained, tmp_path, capsys):
    path = recipe(trained, tmp_path)
    code, shown = run(capsys, "pretrain", path, "--stage", "filter", "--json")
    assert code == 0
    told = json.loads(shown.out)
    assert told["steps"] == NUM_STEPS
    assert Path(told["export"], "config.json").is_file()


def test_a_dry_run_tells_the_plan_and_trains_nothing(corpus_only, tmp_path, capsys):
    path = recipe(corpus_only, tmp_path)
    code, shown = run(capsys, "pretrain", path, "--stage", "med", "--dry-run", "--json")
    assert (code, json.loads(shown.out)["num_steps"]) == (0, NUM_STEPS)
    assert not (corpus_only / "train").exists()


def test_wrong_commands_exit_with_two_and_say_why(corpus_only, tmp_path, capsys):
    path = recipe(corpus_only, tmp_path)
    assert run(capsys, "pretrain", path, "--stage", "stage3")[0] == 2
    code, shown = run(capsys, "pretrain", path, "--stage", "stage2")
    assert code == 2
    assert "capfilt pretrain RECIPE --stage stage1" in shown.err
