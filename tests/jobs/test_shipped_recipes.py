"""Shipped recipes do what they say: as the papers had it, at the cost that stands above them."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from stand_ins import FILES, pictures, write_laion, write_lists

import jobs.cli
from jobs.demo.plan import WebConfig
from jobs.demo.web import build_web
from jobs.errors import RecipeError, UserError
from jobs.estimate.command import Question, answer
from jobs.estimate.rates import load_rates
from jobs.estimate.work import work_of
from jobs.hub_models import hub_models, unpinned
from jobs.recipe import dump_recipe, load_recipe
from jobs.rehearsal import RehearsalConfig, rehearsed
from jobs.training.data import image_size, loader_config
from jobs.training.job import training_job
from jobs.training.plan import plan_stage
from pipeline.corpus import Corpus
from pipeline.ledger import BASE_FIELDS
from pipeline.loading.config import SourceConfig as ShareConfig
from pipeline.verify import verify

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "jobs" / "recipes"
CLUSTER = ROOT / "ray_cluster.yaml"
BIG = ("cc3m", "blip-14m", "blip2-129m")
DEMO_SOURCES = ("laion", "cc3m", "human", "test")
ROWS = 2500  # of each stand-in list: three of them in a rehearsal


def path_of(name):
    return str(RECIPES / f"{name}.yaml")


def header(name):
    """What stands above a recipe, without the comment signs."""
    lines = Path(path_of(name)).read_text().split("\nname: ")[0].splitlines()
    return [line.removeprefix("#").removeprefix(" ") for line in lines]


def commands_in(lines):
    """The commands of a header, their continuations joined."""
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = re.findall(r"^\s+(capfilt .*)$", text, re.MULTILINE)
    return [shlex.split(command, comments=True)[1:] for command in found]


def capfilt(*arguments):
    with pytest.raises(SystemExit) as ended:
        jobs.cli.main([str(each) for each in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Every published list in small: `ROWS` rows each, of a server that is there on loopback."""
    folder = tmp_path_factory.mktemp("lists")
    with pictures() as server:
        urls = [server.url(f"/{number}.jpg") for number in range(ROWS)]
        write_lists(folder, urls)
        yield folder, server


def pointed_at(lists, name, root):
    """The `--set` arguments that give a recipe the stand-in lists."""
    folder, server = lists
    named = [source.name for source in load_recipe(path_of(name)).sources]
    sets = [f"sources.{each}.paths=['{folder / FILES[each]}']" for each in named]
    if "visual_genome" in named:
        sets.append(f"sources.visual_genome.image_data='{folder / 'image_data.json'}'")
    sets += [f"root='{root}'", "run.engine=local", "fetch.allowed_networks=[127.0.0.1/32]"]
    sets += [f"fetch.allowed_ports=[{server.port}]", "fetch.is_robots_txt_honoured=false"]
    return [f"--set={each}" for each in sets]


# --- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIG)
def test_the_figures_above_a_recipe_are_those_that_plan_prints(name, capsys, monkeypatch):
    monkeypatch.chdir(RECIPES)
    (command,) = [each for each in commands_in(header(name)) if each[0] == "plan"]
    command = [str(CLUSTER) if each == "ray_cluster.yaml" else each for each in command]
    assert capfilt(*command) == 0
    tables = capsys.readouterr().out.split("\n\nSimulated")[0]
    wanted = [line for line in tables.splitlines() if line.startswith("|")]
    wanted = [line for line in wanted if not line.startswith("|--")]
    stated = [line.strip() for line in header(name) if line.strip().startswith("|")]
    assert stated == wanted, "the header is to have these:\n" + "\n".join(
        f"#   {line}" for line in wanted
    )


@pytest.mark.parametrize("name", [*BIG, "demo"])
def test_every_command_above_a_recipe_is_one(name):
    for command in commands_in(header(name)):
        assert capfilt(command[0], "--help") == 0
    if name != "demo":
        recipes = {word for command in commands_in(header(name)) for word in command[1:2]}
        assert recipes == {f"{name}.yaml"}


def test_laions_lists_are_thinned_by_size_as_the_header_says(tmp_path):
    (tmp_path / "laion400m-meta").mkdir()
    heights = [100, 256, 257, 640, 300]
    write_laion(tmp_path / "laion400m-meta" / "part-0.parquet", list("abcde"), heights)
    write_laion(tmp_path / "laion400m-meta" / "part-1.parquet", list("fghij"), heights)
    text = "\n".join(header("blip2-129m"))
    command = re.search(r'python -c "import duckdb.*?"$', text, re.DOTALL | re.MULTILINE)[0]
    program = command.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    recipe = load_recipe(path_of("blip2-129m"))
    (laion,) = [each for each in recipe.sources if each.name == "laion"]
    kept = pq.read_table(tmp_path / laion.paths[0])
    assert kept["URL"].to_pylist() == list("cdehij")
    assert set(laion.extra_columns) <= set(kept.column_names)


# --- as the papers had it -----------------------------------------------------------------------


def numbers(name, stage, num_pairs):
    job = training_job(load_recipe(path_of(name)), stage)
    return plan_stage(stage, job.section, num_pairs), job


def test_blip2_is_trained_as_in_the_paper():
    for stage, batch, steps, floor in (
        ("stage1", 1680, 250_000, 1e-5),
        ("stage2", 1920, 80_000, 5e-5),
    ):
        plan, job = numbers("blip2-129m", stage, 97_000_000)
        assert (plan.global_batch_size, plan.num_steps) == (batch, steps)
        schedule = asdict(plan.schedule)
        assert schedule["peak"] == 1e-4
        assert schedule["floor"] == floor
        assert (schedule["warmup_steps"], schedule["total_steps"]) == (2000, steps)
        assert plan.adamw.betas == (0.9, 0.98)
        assert plan.adamw.weight_decay == 0.05
        assert image_size(job) == 224
        loader = loader_config(job, batch)
        assert loader.stage == "clean"
        assert loader.augmentation == "crop"
        assert loader.sources == {}, "all of them, in the shares that sources have by name"
    recipe = load_recipe(path_of("blip2-129m"))
    passes = {each.name: ShareConfig().passes_per_epoch(each.name) for each in recipe.sources}
    assert {name: float(share) for name, share in passes.items() if share != 1} == {"laion": 0.2}
    assert (recipe.captioner.num_captions, recipe.captioner.method) == (10, "nucleus")
    assert (recipe.scorer.filter, recipe.scorer.clip.name) == (
        None,
        "openai/clip-vit-large-patch14",
    )
    assert (recipe.select.policy, recipe.select.top_k) == ("blip2", 2)


def test_blips_med_is_trained_as_in_the_paper():
    plan, job = numbers("blip-14m", "med", 14_000_000)
    steps_per_epoch = 14_000_000 // 2880
    assert plan.global_batch_size == 2880
    assert plan.num_steps == 20 * steps_per_epoch
    schedule = asdict(plan.schedule)
    assert (schedule["peak"], schedule["floor"], schedule["start"]) == (3e-4, 1e-6, 1e-6)
    assert (schedule["warmup_steps"], schedule["decay"]) == (3000, 0.85)
    assert plan.adamw.betas == (0.9, 0.999)
    assert plan.adamw.weight_decay == 0.05
    loader = loader_config(job, 2880)
    assert (loader.stage, loader.augmentation, loader.max_words) == (
        "clean",
        "crop_randaugment",
        30,
    )
    recipe = load_recipe(path_of("blip-14m"))
    captioner = recipe.captioner
    assert (captioner.num_captions, captioner.method, captioner.top_p) == (1, "nucleus", 0.9)
    assert (captioner.min_length, captioner.max_length) == (5, 20)
    assert (recipe.select.policy, recipe.select.itm_threshold) == ("blip", 0.5)


@pytest.mark.parametrize("name", BIG)
def test_models_of_the_hub_are_pinned_to_a_commit(name):
    models = hub_models(load_recipe(path_of(name)))
    assert {each.name for each in models} >= {"Salesforce/blip-image-captioning-large"}
    assert list(unpinned(models)) == []


# --- rehearsals ---------------------------------------------------------------------------------


def leaves(tree, path=()):
    """The values of nested sections by their dotted keys; a list is one value."""
    if not isinstance(tree, dict):
        return {".".join(path): tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, (*path, key)).items()}


def changed(name):
    """What a rehearsal has otherwise than the recipe: keys and values."""
    before, after = (
        leaves(load_recipe(path_of(name), is_rehearsal=flag).model_dump(mode="json"))
        for flag in (False, True)
    )
    return {
        key: value for key, value in after.items() if before.get(key, "absent") != value
    }, before


@pytest.mark.parametrize("name", BIG)
def test_a_rehearsal_is_the_same_recipe_on_a_thousandth(name):
    found, before = changed(name)
    assert found.pop("name") == f"{name}-rehearsal"
    assert found.pop("root") == f"corpus/{name}-rehearsal"
    thinned = [{**source, "one_in": 1000} for source in before["sources"]]
    assert found.pop("sources") == thinned
    assert found.pop("download.rows_per_shard") == 100
    assert found.pop("rehearsal") is None
    counts = "num_steps|warmup_steps|(log|checkpoint|probe)_every_steps|held_out_share"
    own = "rehearsal.overrides."
    overridden = {
        key.removeprefix(own): value for key, value in before.items() if key.startswith(own)
    }
    for key, value in found.items():
        assert overridden.get(key) == value or re.fullmatch(rf"training\..*({counts})", key), key


def test_steps_and_warm_up_of_a_rehearsal_are_a_thousandth_of_the_papers():
    recipe = load_recipe(path_of("blip2-129m"), is_rehearsal=True)
    for stage, steps in (("stage1", 250), ("stage2", 80)):
        job = training_job(recipe, stage)
        plan = plan_stage(stage, job.section, 97_000)
        assert (plan.num_steps, asdict(plan.schedule)["warmup_steps"]) == (steps, 2)
        assert plan.global_batch_size in (1680, 1920)
    watch = recipe.training.watch
    assert (watch.log_every_steps, watch.checkpoint_every_steps) == (5, 10)
    assert recipe.training.held_out_share == 0.05


@pytest.mark.parametrize(("name", "stage"), [("cc3m", "stage1"), ("blip-14m", "med")])
def test_a_rehearsal_has_pairs_enough_for_its_batches(name, stage):
    recipe = load_recipe(path_of(name), is_rehearsal=True)
    (plan_command,) = [each for each in commands_in(header(name)) if each[0] == "plan"]
    rates = [word for word in plan_command if word.startswith("rows.")]
    asked = Question(path_of(name), str(CLUSTER), rates=rates, is_rehearsal=True)
    plan = json.loads(answer(asked, as_json=True))
    num_pairs = round(plan["survivors"]["images with a kept caption"]["low"] * 0.95)
    job = training_job(recipe, stage)
    assert plan_stage(stage, job.section, num_pairs).num_steps >= 20


@pytest.mark.parametrize("name", BIG)
def test_a_rehearsal_is_planned_with_its_own_rows(name):
    (command,) = [each for each in commands_in(header(name)) if each[0] == "plan"]
    rates = [word for word in command if word.startswith("rows.")]
    whole, part = (
        json.loads(
            answer(
                Question(path_of(name), str(CLUSTER), rates=rates, is_rehearsal=flag), as_json=True
            )
        )
        for flag in (False, True)
    )
    wanted = sum(-(-int(rate.partition("=")[2]) // 1000) for rate in rates)
    known = load_rates(rates).rows
    assert work_of(load_recipe(path_of(name), is_rehearsal=True), known).num_rows == wanted
    assert part["survivors"]["rows in the lists"]["mid"] == pytest.approx(wanted, rel=1e-3)
    assert part["run"] == f"{name}-rehearsal"
    assert part["hours"]["mid"] < whole["hours"]["mid"] / 10
    assert {each: stage["actors"] for each, stage in part["stages"].items()} == {
        each: stage["actors"] for each, stage in whole["stages"].items()
    } or name == "cc3m"


@pytest.mark.parametrize("name", BIG)
def test_a_rehearsal_runs_through_the_download_beside_the_runs_root(name, lists, tmp_path, capsys):
    sets = pointed_at(lists, name, tmp_path / "corpus")
    assert capfilt("download", path_of(name), "--rehearsal", *sets) == 0
    assert not (tmp_path / "corpus").exists()
    corpus = Corpus(str(tmp_path / "corpus-rehearsal"))
    recipe = load_recipe(path_of(name))
    for source in recipe.sources:
        (record,) = corpus.shards("raw", source.name)
        assert (record.counts.total, record.counts.kept) == (3, 3)
        with corpus.open(record, "parquet") as stream:
            table = pq.read_table(stream, columns=[field.name for field in BASE_FIELDS])
        numbers_read = [re.search(r"(\d+)\.jpg", url)[1] for url in table["url"].to_pylist()]
        assert numbers_read == ["0", "1000", "2000"]
    assert list(verify(corpus)) == []


@pytest.mark.parametrize("name", BIG)
def test_a_dry_run_shows_the_resolved_recipe_and_its_shards(name, lists, tmp_path, capsys):
    sets = pointed_at(lists, name, tmp_path / "corpus")
    for flags, num_rows in ((), ROWS), (("--rehearsal",), 3):
        assert capfilt("run", path_of(name), "--dry-run", "--json", *flags, *sets) == 0
        plan = json.loads(capsys.readouterr().out)
        stages = [stage["stage"] for stage in plan["stages"]]
        assert set(stages) == {"download", "score", "select"}
        assert {stage["rows"] for stage in plan["stages"]} == {num_rows}
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_the_demos_recipe_needs_its_web_alone(tmp_path, capsys):
    write_laion(tmp_path / "laion.parquet", ["http://x.org/a"], [9])
    (tmp_path / "cc3m.tsv").write_text("a caption\thttp://x.org/b\n")
    (tmp_path / "human.json").write_text(json.dumps({"images": [], "annotations": []}))
    paths = {
        "laion": "laion.parquet",
        "cc3m": "cc3m.tsv",
        "human": "human.json",
        "test": "human.json",
    }
    sets = [f"--set=sources.{name}.paths=['{tmp_path / file}']" for name, file in paths.items()]
    assert capfilt("run", path_of("demo"), "--dry-run", *sets) == 0
    assert "download laion: 1 rows in 1 shards" in capsys.readouterr().out


def test_a_plan_of_a_rehearsal_is_asked_for_by_the_same_flag(capsys):
    arguments = ["--cluster", CLUSTER, "--rates", "rows.cc3m=3318333", "--rehearsal"]
    assert capfilt("plan", path_of("cc3m"), *arguments) == 0
    assert "# Plan of cc3m-rehearsal on capfilt" in (out := capsys.readouterr().out)
    assert "3,319 rows of 1 sources in 34 shards" in out


@pytest.mark.parametrize("root", ["s3://my-bucket", "gs://my-bucket/"])
def test_a_rehearsal_never_goes_to_another_bucket(root):
    with pytest.raises(UserError, match="beside a whole bucket.*name a folder in it"):
        load_recipe(path_of("cc3m"), [f"root={root}"], is_rehearsal=True)
    inside = load_recipe(path_of("cc3m"), [f"root={root.rstrip('/')}/a/"], is_rehearsal=True)
    assert inside.root == f"{root.rstrip('/')}/a-rehearsal"


def test_a_rehearsal_goes_through_the_whole_job_beside_the_runs_root(tmp_path, capsys):
    web = build_web(tmp_path / "web", WebConfig(num_web=100, num_human=40, num_test=20, port=0))
    tiny = {"preset": "tiny", "num_steps": 30, "global_batch_size": 4, "num_frozen_layers": 0}
    stages = {
        "med": tiny | {"image_encoder": "random", "queue_size": 32},
        "captioner": tiny,
        "filter": tiny | {"queue_size": 32},
        "stage1": tiny | {"image_encoder": "trained"},
        "stage2": tiny | {"llm": "null"},
    }
    sets = [f"sources.{name}.paths=['{getattr(web.lists, name)}']" for name in DEMO_SOURCES]
    sets += [
        f"training.{stage}.{key}={value}"
        for stage, section in stages.items()
        for key, value in section.items()
    ]
    sets += [f"root='{tmp_path / 'corpus'}'", f"fetch.allowed_ports=[{web.port}]"]
    sets += ["rehearsal.one_in=2", "select.itm_threshold=0.3"]
    flags = ["--rehearsal", *(f"--set={each}" for each in sets)]
    with web.serve():
        assert capfilt("run", path_of("demo"), *flags) == 0
    capsys.readouterr()
    assert capfilt("pretrain", path_of("demo"), "--stage", "stage1", *flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 20
    assert not (tmp_path / "corpus").exists()
    corpus = Corpus(str(tmp_path / "corpus-rehearsal"))
    for source, num_rows in {"laion": 30, "cc3m": 20, "human": 20, "test": 10}.items():
        assert sum(record.rows_in for record in corpus.shards("clean", source)) == num_rows
    assert list(verify(corpus)) == []


def test_a_rehearsal_is_resolved_once_and_says_so(tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(load_recipe(path_of("cc3m"), is_rehearsal=True)))
    assert load_recipe(str(path)).name == "cc3m-rehearsal"
    with pytest.raises(RecipeError, match="this is a rehearsal's recipe already"):
        load_recipe(str(path), is_rehearsal=True)


def test_a_wrong_override_of_a_rehearsal_is_named(tmp_path):
    text = Path(path_of("cc3m")).read_text().replace("stage1.global_batch_size", "stage1.batch")
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(
        RecipeError, match=r"rehearsal\.overrides\.training\.stage1\.batch: .*unknown key"
    ):
        load_recipe(str(path), is_rehearsal=True)


def test_small_counts_are_not_divided_to_nothing():
    recipe = load_recipe(path_of("demo"))
    part = rehearsed(recipe, RehearsalConfig(one_in=100))
    assert part.training.med.num_steps == 20
    assert part.training.med.warmup_steps == 1
    assert part.training.watch.probe_every_steps == 0
    assert part.download.rows_per_shard == 100
    assert len(part.name) <= 63
    assert [each.one_in for each in part.sources] == [100] * 4
    assert yaml.safe_load(dump_recipe(part))["root"] == "capfilt-demo/corpus-rehearsal"
