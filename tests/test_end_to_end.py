"""The demo as a person runs it: interrupted, killed, continued, and every row where it belongs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CAPFILT = str(Path(sys.executable).with_name("capfilt"))
DEADLINE_SECONDS = 400
MOMENTS = (
    "raw/laion/00000.json",
    "train/filter/metrics.jsonl",  # while the captioner is trained beside it
    "captions/cc3m/00000.json",
    "clean/cc3m/00000.json",
    "train/stage2",
)


def demo(root, *options):
    return [CAPFILT, "demo", "--quick", "--root", str(root), *options]


def start(root):
    return subprocess.Popen(
        demo(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root.parent,
        start_new_session=True,
    )


def wait_for(path, process):
    """Wait until a file exists; the process that is to write it must not end before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)  # polls, and leaves the processor to what it waits for


def finish(root):
    done = subprocess.run(
        demo(root, "--json"),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=root.parent,
        check=True,
    )
    return json.loads(done.stdout)


def tree(root):
    """Return every committed file of all three stages."""
    corpus = root / "corpus"
    return {
        str(f.relative_to(corpus)): f.read_bytes()
        for stage in ("raw", "captions", "clean")
        for f in sorted((corpus / stage).rglob("*"))
        if f.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed") / "demo"
    return finish(root), tree(root)


def test_every_row_ends_as_the_webs_truth_says(undisturbed):
    summary, files = undisturbed
    sources = summary["sources"]
    assert {name: each["num_rows"] for name, each in sources.items()} == {
        "laion": 900,
        "cc3m": 600,
        "human": 500,
        "test": 200,
    }
    for each in sources.values():
        assert each["num_rows"] == each["num_kept"] + each["num_dropped"] + each["num_failed"]
        assert each["num_surprises"] == 0
        assert each["num_obtainable"] == each["num_kept"]
    assert summary["faults"] == 0
    assert 0.35 < sources["laion"]["num_noisy"] / sources["laion"]["num_kept"] < 0.55
    assert len(files) == 4 * (3 + 2 + 3)  # sources; files of raw, captions and clean shards


def test_the_filter_finds_wrong_captions_and_the_report_is_there(undisturbed, tmp_path):
    summary, _ = undisturbed
    web = summary["filter"]["web"]
    assert web["num_captions"] > 1000
    assert web["auc"] > 0.55  # after a few dozen steps; the whole demo reaches 0.9
    assert web["right_after"] is None or web["right_after"] > web["right_before"]
    assert summary["filter"]["synthetic"]["num_captions"] == web["num_captions"]
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")


def test_blip2_is_trained_on_the_clean_corpus_and_measured(undisturbed):
    models = undisturbed[0]["models"]
    assert set(models["stage1"]) >= {"TR@1", "IR@1", "CIDEr", "exact"}
    assert models["stage1"]["TR@1"] > 0.01  # 200 pictures: chance is .005
    assert models["stage2"]["CIDEr"] > 0.1  # by the language model, which sees through queries


def test_interrupted_killed_and_continued_ends_in_the_same_bytes(undisturbed, tmp_path):
    root = tmp_path / "demo"
    interrupted = start(root)
    wait_for(root / "corpus" / "run.yaml", interrupted)
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=DEADLINE_SECONDS)
    assert interrupted.returncode == 130
    assert "the same command again" in out
    assert "Traceback" not in err

    corpus = root / "corpus"
    for moment in MOMENTS:
        killed = start(root)
        wait_for(corpus / moment, killed)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()

    summary = finish(root)
    assert summary["faults"] == 0
    for part in ("sources", "filter", "models"):
        assert summary[part] == undisturbed[0][part]
    assert tree(root) == undisturbed[1]


def test_another_size_in_the_same_folder_is_refused(undisturbed, tmp_path):
    root = tmp_path / "demo"
    (root / "web").mkdir(parents=True)
    (root / "web" / "web.json").write_text('{"format": 1, "port": 1, "config": {"num_web": 3}}')
    done = subprocess.run(demo(root), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds a web of another config" in done.stderr
    assert "Traceback" not in done.stderr
