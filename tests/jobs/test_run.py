"""A run from the command line, through all stages: begun, resumed, changed, replaced."""

import json
import shlex
from datetime import UTC, datetime

import chaos_jobs as chaos
import pyarrow.parquet as pq
import pytest

import jobs.cli
from jobs.durable import Condition
from jobs.status import read_status
from pipeline.corpus import Corpus
from pipeline.verify import verify


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return chaos.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def capfilt(capsys, world, tmp_path):
    """Run one command on the world's recipe into a root of the test's own."""

    def run(name, *options):
        arguments = [name, str(world), f"--set=root={tmp_path}/corpus", *map(str, options)]
        with pytest.raises(SystemExit) as ended:
            jobs.cli.main(arguments)
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def corpus(tmp_path):
    return Corpus(str(tmp_path / "corpus"))


def counts(corpus):
    return {folder: len(corpus.shards(folder)) for folder in chaos.FOLDERS}


def test_one_command_makes_every_stage_and_the_next_one_finds_nothing_to_do(capfilt, corpus):
    code, out, err = capfilt("run")
    assert code == 0
    for stage in ("download", "score", "select"):
        assert f"{stage}: {chaos.NUM_SHARDS} shards done, {chaos.NUM_SHARDS} of them now" in out
        assert f"{stage}: 48/48 rows (100%)" in err
    assert list(verify(corpus)) == []
    before = chaos.tree(corpus.store)
    code, out, _ = capfilt("run")
    assert (code, f"select: {chaos.NUM_SHARDS} shards done, 0 of them now" in out) == (0, True)
    assert chaos.tree(corpus.store) == before


def test_stage_by_stage_comes_to_the_same(capfilt, corpus, tmp_path):
    capfilt("run", f"--set=root={tmp_path}/whole")
    whole = chaos.tree(Corpus(str(tmp_path / "whole")).store)
    for number, stage in enumerate(("download", "score", "select"), 1):
        code, out, _ = capfilt(stage)
        assert (code, f"{chaos.NUM_SHARDS} shards done" in out) == (0, True)
        assert list(counts(corpus).values()) == [chaos.NUM_SHARDS] * number + [0] * (3 - number)
    assert chaos.tree(corpus.store) == whole


def test_a_stage_whose_upstream_is_missing_has_nothing_to_do(capfilt, corpus):
    code, out, _ = capfilt("select")
    assert (code, out) == (0, "0 shards done, 0 of them now\n")


def test_another_policy_is_refused_by_run_with_the_key_and_made_by_select(capfilt, corpus):
    capfilt("run")
    other = ["--set=select.policy=expression", "--set=select.expression='index = 0'"]
    code, _, err = capfilt("run", *other)
    assert code == 2
    assert "policy was 'web_only', now 'expression'" in err
    assert "`capfilt select` does that" in err
    scored = {name: data for name, data in chaos.tree(corpus.store).items() if "clean" not in name}
    code, out, _ = capfilt("select", *other)
    assert (code, f"{chaos.NUM_SHARDS} of them now" in out) == (0, True)
    now = chaos.tree(corpus.store)
    assert {name: data for name, data in now.items() if "clean" not in name} == scored
    assert list(verify(corpus)) == []


def test_other_score_settings_are_refused_with_the_key(capfilt):
    capfilt("run")
    code, _, err = capfilt("run", "--set=score.max_aspect=50")
    assert code == 2
    assert "score.max_aspect was 100.0, now 50.0" in err
    code, _, _ = capfilt("run", "--set=score.batch_size=2")
    assert code == 0


def test_images_that_a_retry_brings_are_scored_and_selected_by_the_next_run(
    tmp_path_factory, capsys
):
    folder = tmp_path_factory.mktemp("late")
    recipe = chaos.write_world(folder)
    command = [str(recipe), f"--set=root={folder}/corpus"]

    def run(name, *options):
        with pytest.raises(SystemExit) as ended:
            jobs.cli.main([name, *command, *options])
        return ended.value.code, capsys.readouterr().out

    late = (folder / "images" / "4.jpg").rename(folder / "4.jpg")
    assert run("run")[0] == 0
    late.rename(folder / "images" / "4.jpg")
    assert run("retry", "--only=all")[0] == 0
    code, out = run("run")
    assert code == 0
    assert "download: 8 shards done, 0 of them now" in out
    assert "score: 8 shards done, 2 of them now" in out
    assert "select: 8 shards done, 2 of them now" in out
    corpus = Corpus(str(folder / "corpus"))
    assert list(verify(corpus)) == []
    with corpus.open(corpus.record("clean", "web", 0), "parquet") as stream:
        rows = pq.read_table(stream).to_pylist()
    assert [row["verdict"] for row in rows if row["url"].endswith("/4.jpg")] == ["kept"]


def test_two_workers_run_on_a_ray_of_their_own(tmp_path, world):
    """As a person would: nothing configured, nothing running, nothing left behind."""
    children = chaos.Children(tmp_path)
    try:
        arguments = chaos.command(world, tmp_path / "corpus", "run.workers=2")
        code = children.run([*arguments, "--json"])
        output = children.output
    finally:
        children.close()
    assert code == 0, output
    summary = json.loads(output[output.index("{\n") :])
    assert summary["shards_new"] == chaos.NUM_MARKERS
    assert summary["stages"]["score"]["busy_seconds"] > 0
    status = read_status(str(tmp_path / "corpus"), datetime.now(UTC))
    assert (status.run.condition, status.run.engine) == (Condition.DONE, "ray")
    assert not (tmp_path / ".ray").exists()


def test_on_a_cluster_a_relative_root_is_refused_before_anything_is_written(capfilt, tmp_path):
    code, _, err = capfilt("run", "--set=root=here", "--address=127.0.0.1:1")
    assert code == 2
    assert "root = here: relative to this machine" in err


def test_a_cluster_that_does_not_answer_is_told_with_what_to_look_at(
    world, tmp_path, capfilt, corpus
):
    code, _, err = capfilt("run", "--address=127.0.0.1:1")
    assert code == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in err
    assert counts(corpus) == dict.fromkeys(chaos.FOLDERS, 0)


def test_the_status_holds_the_command_that_continues(capfilt, corpus):
    capfilt("run", "--set=name=other-name")
    command = shlex.split(read_status(corpus.root, datetime.now(UTC)).run.command)
    assert command[:2] == ["capfilt", "run"]
    assert "--set=name=other-name" in command


def test_the_plan_names_every_stage_and_what_is_done(capfilt):
    capfilt("download")
    code, out, _ = capfilt("run", "--dry-run")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("# ")]
    assert "# score web: 4 shards, 0 of them done -> captions/web/" in lines
    assert "# select human: 4 shards, 0 of them done -> clean/human/" in lines
    plan = json.loads(capfilt("run", "--dry-run", "--json")[1])
    assert [(each["stage"], each["shards_done"]) for each in plan["stages"]] == [
        ("download", 4),
        ("download", 4),
        ("score", 0),
        ("score", 0),
        ("select", 0),
        ("select", 0),
    ]
