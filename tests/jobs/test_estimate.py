"""A plan adds up: bands hold, bottlenecks are found, what is assumed says so."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cluster_file import load_cluster_file
from jobs.errors import UserError
from jobs.estimate.command import Question, answer, measure
from jobs.estimate.estimate import estimate
from jobs.estimate.flops import captioning_flops, scoring_flops
from jobs.estimate.measure import Band, Measure, share_measured
from jobs.estimate.rates import Rates, dump_rates, load_rates
from jobs.estimate.reckoning import band, reckon
from jobs.estimate.table import plan_text
from jobs.estimate.work import work_of
from jobs.recipe import Recipe
from pipeline.model_configs import CaptionerConfig, ScorerConfig

CLUSTER_FILE = Path(__file__).parents[2] / "ray_cluster.yaml"
NUM_ROWS = 1_000_000


def recipe(**changes):
    values = {
        "name": "pets",
        "root": "s3://bucket/pets",
        "sources": [{"name": "web", "format": "cc3m", "paths": ["not-here.tsv"]}],
        "captioner": {"num_captions": 10},
        "scorer": {},
        "score": {"dtype": "bfloat16"},
        "select": {"policy": "blip2"},
        "run": {
            "download": {"max_actors": 64},
            "score": {"max_actors": 16, "num_cpus": 4},
            "select": {"max_actors": 16},
        },
    }
    return Recipe.model_validate(values | changes)


def rates(*given_rates):
    return load_rates([f"rows.web={NUM_ROWS}", *given_rates])


@pytest.fixture(scope="module")
def cluster():
    return load_cluster_file(str(CLUSTER_FILE))


def reckoned(cluster, *given_rates, **changes):
    known = rates(*given_rates)
    return reckon(work_of(recipe(**changes), known.rows), cluster, known)


# --- quantities -------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e6), st.floats(1.0, 5.0), st.floats(1.0, 5.0))
@settings(deadline=None, max_examples=30)
def test_nine_in_ten_draws_lie_in_a_measures_band(value, down, up):
    measured = Measure(value=value, low=value / down, high=value * up, source="test")
    drawn = Band.of(measured.draws(np.random.default_rng(0), 20_000))
    assert drawn.mid == pytest.approx(value, rel=0.05)
    assert drawn.low == pytest.approx(measured.low, rel=0.1)
    assert drawn.high == pytest.approx(measured.high, rel=0.1)


@pytest.mark.parametrize(("share", "trials"), [(0.75, 300), (0.97, 100), (0.2, 50)])
def test_a_measured_shares_interval_holds_the_truth_nine_times_in_ten(share, trials):
    random = np.random.default_rng(1)
    successes = np.clip(random.binomial(trials, share, 2000), 1, None)
    measured = [share_measured(int(number), trials, "test") for number in successes]
    held = np.mean([each.low <= share <= each.high for each in measured])
    assert 0.85 <= held <= 0.96


def test_a_share_of_all_is_not_more_than_all():
    everything = share_measured(40, 40, "test")
    assert everything.high == 1.0
    assert 0.9 < everything.low < 1.0


def test_flops_are_those_of_the_papers_models():
    # CLIP ViT-L/14 at 224 px is published as 81 GMACs, BLIP's ViT-B/16 at 384 px as 55.5.
    clip_only = ScorerConfig(filter=None)
    assert scoring_flops(clip_only, 0) == pytest.approx(2 * 81e9, rel=0.02)
    base = CaptionerConfig(name="Salesforce/blip-image-captioning-base")
    assert captioning_flops(base) == pytest.approx(2 * 55.5e9, rel=0.25)
    ten = captioning_flops(CaptionerConfig(num_captions=10))
    assert ten < 1.2 * captioning_flops(CaptionerConfig(num_captions=1))


# --- rates ------------------------------------------------------------------------------------


def test_rates_come_from_files_and_settings_the_last_winning(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("success_share: {web: 0.5, other: 0.4}\ngpu_utilisation: 0.2\n")
    loaded = load_rates([str(path), "success_share.web=0.6", "rows.web=7"])
    assert loaded.success_of("web", "cc3m").value == 0.6
    assert loaded.success_of("other", "cc3m").value == 0.4
    assert loaded.gpu_utilisation.low == loaded.gpu_utilisation.high == 0.2
    assert loaded.rows == {"web": 7}


def test_what_is_saved_is_what_was_known(tmp_path):
    known = load_rates(
        ["success_share.web={value: 0.5, low: 0.4, high: 0.6, source: probed}", "rows.web=7"]
    )
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(dump_rates(known)))
    assert load_rates([str(path)]) == known
    assert dump_rates(Rates()) == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gpu_utilization=0.2", "gpu_utilization: Extra inputs"),
        ("gpu_utilisation=-1", "gpu_utilisation.value: Input should be greater than 0"),
        ("gpu_utilisation={value: 2, low: 3}", "not in order"),
        ("rows.web=0", "rows.web: Input should be greater"),
        ("no-such-file", "--rates no-such-file: cannot be read"),
    ],
)
def test_a_wrong_rate_is_named(setting, message):
    with pytest.raises(UserError, match=message):
        load_rates([setting])


def test_every_default_is_an_assumption_with_a_reason():
    for name, value in Rates().model_dump().items():
        if isinstance(value, dict) and "source" in value:
            assert value["source"].startswith("assumption: "), name


# --- the reckoning ----------------------------------------------------------------------------


def test_exact_rates_give_the_hours_that_one_reckons_by_hand(cluster):
    done = reckoned(
        cluster,
        "download_rows_per_cpu_second=50",
        "success_share.web=0.5",
        "score_images_per_gpu_second.L4=20",
        "select_images_per_cpu_second=250",
        "kept_share.blip2=0.9",
    )
    seconds = {stage.name: band(stage.seconds) for stage in done.stages}
    assert seconds["download"].mid == pytest.approx(NUM_ROWS / 50 / 64)
    assert seconds["score"].mid == pytest.approx(NUM_ROWS * 0.5 / 20 / 16)
    assert seconds["select"].mid == pytest.approx(NUM_ROWS * 0.5 / 250 / 16)
    assert seconds["score"].low == seconds["score"].high
    assert done.bottleneck.name == "score"
    assert band(done.gpu_seconds).mid == pytest.approx(NUM_ROWS * 0.5 / 20)
    survivors = [band(draws).mid for draws in done.survivors.values()]
    assert survivors == pytest.approx([NUM_ROWS, NUM_ROWS * 0.5, NUM_ROWS * 0.45])


def test_a_slow_web_makes_the_download_the_bottleneck(cluster):
    assert reckoned(cluster, "download_rows_per_cpu_second=0.5").bottleneck.name == "download"


def test_no_more_actors_than_the_cluster_has_places_or_the_run_has_shards(cluster):
    run = {"score": {"max_actors": 5000}, "download": {"max_actors": 5000}}
    actors = {stage.name: stage.num_actors for stage in reckoned(cluster, run=run).stages}
    assert actors["download"] == NUM_ROWS / 10_000
    few_shards = {"download": {"rows_per_shard": 1000}}
    actors = {
        stage.name: stage.num_actors for stage in reckoned(cluster, run=run, **few_shards).stages
    }
    assert actors["download"] == 32 * 16
    assert actors["score"] == 32 * 4


def test_human_captions_cost_no_captioning_and_are_all_kept(cluster):
    human = [
        {"name": "web", "format": "table", "paths": ["x.csv"], "origin": "human"},
    ]
    ours = reckoned(cluster, "success_share.web=1", "kept_share.blip2=0.5", sources=human)
    web = reckoned(cluster, "success_share.web=1", "kept_share.blip2=0.5")
    assert band(ours.survivors["images with a kept caption"]).mid == NUM_ROWS
    assert band(web.survivors["images with a kept caption"]).mid == NUM_ROWS / 2
    assert band(ours.gpu_seconds).mid < 0.6 * band(web.gpu_seconds).mid


def test_a_recipe_that_only_downloads_needs_no_gpu(cluster):
    done = reckoned(cluster, captioner=None, scorer=None, select=None)
    assert [stage.name for stage in done.stages] == ["download"]
    assert band(done.gpu_seconds).high == 0
    assert list(done.bytes) == ["fetched from the web", "raw"]


def test_a_gpu_that_nobody_knows_is_asked_for(cluster):
    pools = [
        pool.model_copy(update={"accelerator": "X9"}) if pool.name == "score" else pool
        for pool in cluster.pools
    ]
    strange = cluster.model_copy(update={"pools": tuple(pools)})
    with pytest.raises(UserError, match="how fast X9 is.*score_images_per_gpu_second"):
        reckoned(strange)
    assert reckoned(strange, "score_images_per_gpu_second.X9=30").bottleneck.name == "score"


def test_an_actor_that_fits_no_node_is_refused(cluster):
    run = {"score": {"max_actors": 2, "num_cpus": 64}}
    with pytest.raises(UserError, match="no place for an actor of score, which wants 64 CPUs"):
        reckoned(cluster, run=run)


def test_lists_that_cannot_be_read_ask_for_their_rows(cluster):
    with pytest.raises(UserError, match=r"source web: .*--rates rows\.web=1000000"):
        work_of(recipe(), {})


def test_lists_that_are_here_are_counted(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"a caption\thttp://x.example/{n}.jpg\n" for n in range(123)))
    sources = [{"name": "web", "format": "cc3m", "paths": [str(path)]}]
    work = work_of(recipe(sources=sources), {})
    assert (work.num_rows, work.sources[0].is_counted) == (123, True)


# --- the plan ---------------------------------------------------------------------------------


def test_costs_are_node_hours_times_prices(cluster):
    known = rates()
    done = estimate(work_of(recipe(), known.rows), cluster, known, is_simulated=False)
    hours = band(done.node_seconds["score"], 1 / 3600).mid
    price = cluster.prices.usd_per_node_hour["score"]
    assert band(done.usd["score (g6.12xlarge)"]).mid == pytest.approx(hours * price)
    assert band(done.total_usd).mid == pytest.approx(
        sum(band(draws).mid for draws in done.usd.values()), rel=0.05
    )


def test_a_plan_says_what_it_assumes_and_where_prices_come_from(cluster):
    known = rates("success_share.web={value: 0.6, low: 0.5, high: 0.7, source: probed here}")
    done = estimate(work_of(recipe(), known.rows), cluster, known, is_simulated=False)
    text = plan_text(done)
    for rate in done.reckoning.used.values():
        assert rate.source in text
    assert "probed here" in text
    assert "8 of 9 rates are assumptions" in text
    assert cluster.prices.source.strip() in text
    assert "lists not read: web" in text
    assert "training" in text


def test_the_command_plans_129_million_rows_and_simulates_them(tmp_path):
    path = tmp_path / "blip2.yaml"
    run = {
        "download": {"max_actors": 512},
        "score": {"max_actors": 128, "num_cpus": 8},
        "select": {"max_actors": 64},
    }
    path.write_text(yaml.safe_dump(recipe(run=run).model_dump(mode="json")))
    asked = Question(str(path), str(CLUSTER_FILE), rates=["rows.web=129000000"])
    plan = json.loads(answer(asked, as_json=True))
    assert plan["simulated"]["shards_made"] == {
        stage: 12_900 for stage in ("download", "score", "select")
    }
    assert plan["simulated"]["hours"] == pytest.approx(plan["hours"]["mid"], rel=0.02)
    assert plan["hours"]["low"] < plan["hours"]["mid"] < plan["hours"]["high"]
    assert plan["stages"]["score"]["hours_alone"]["mid"] < plan["hours"]["mid"]
    assert plan["bottleneck"] == "score"


def test_the_same_question_has_the_same_answer(tmp_path):
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    asked = Question(str(path), str(CLUSTER_FILE), rates=[f"rows.web={NUM_ROWS}"])
    assert answer(asked) == answer(asked)


# --- the probe --------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(30):
        pixels = random.integers(0, 255, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    for number in range(10):
        (folder / f"bad{number}.jpg").write_bytes(b"not an image")
    return folder


def test_a_probe_measures_with_the_real_stages_and_leaves_nothing(images, tmp_path, cluster):
    path = tmp_path / "here.yaml"
    root = tmp_path / "corpus"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "here",
                "root": str(root),
                "sources": [{"name": "web", "format": "folder", "paths": [str(images)]}],
                "download": {"image_size_px": 64, "min_side_px": 16},
            }
        )
    )
    saved = tmp_path / "rates.yaml"
    saved.write_text(measure(str(path), (), 40))
    assert not root.exists()
    measured = load_rates([str(saved)])
    share = measured.success_of("web", "folder")
    assert share.value == 0.75
    assert share.low < 0.75 < share.high
    assert not share.is_assumed
    assert not measured.download_rows_per_cpu_second.is_assumed
    assert 500 < measured.stored_bytes_per_image.value < 20_000
    plan = json.loads(
        answer(Question(str(path), str(CLUSTER_FILE), rates=[str(saved)]), as_json=True)
    )
    assert plan["survivors"]["images downloaded"]["mid"] == pytest.approx(30, rel=0.03)
