"""Reports of corpora in every state, on local disks and elsewhere; the card and the gallery."""

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_corpora import HOSTILE, build, commit, drawing

from pipeline.corpus import Corpus
from pipeline.report.build import build_report
from pipeline.report.formats import duration, share, size
from pipeline.report.gallery import MAX_SAMPLES, MAX_SHARDS, examples, is_borderline, spread
from pipeline.report.ledgers import Ledgers, Snapshot
from pipeline.report.thumbnails import SIDE, thumbnail
from pipeline.report.visible import visible, web_link

MAX_PAGE_BYTES = 5 * 2**20


def read(corpus, name):
    return corpus.store.read(f"report/{name}").decode()


def report_of(corpus):
    build_report(corpus)
    return json.loads(read(corpus, "report.json"))


def lost_rows(source, num_rows, reason="http_404"):
    return [
        {
            "key": f"{row:09d}",
            "source": source,
            "url": f"http://host/{row}",
            "verdict": "failed",
            "reason": reason,
            "origin": "web",
            "http_status": 404,
            "attempts": 1,
        }
        for row in range(num_rows)
    ]


def test_an_empty_corpus_has_a_report_that_says_so(tmp_path):
    found = report_of(Corpus(str(tmp_path)))
    assert found["headline"]["rows_in"] == 0
    assert found["missing"][0] == "No shard has been downloaded yet."
    assert found["provenance"]["recipe"] is None


def test_one_row_is_enough(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [1]})
    found = report_of(corpus)
    assert found["headline"]["rows_in"] == 1
    assert "<h2" in read(corpus, "index.html")


def test_a_shard_without_rows_is_no_trouble(tmp_path):
    corpus = Corpus(str(tmp_path))
    above = commit(corpus, ("raw", "none", 0), [])
    above = commit(corpus, ("captions", "none", 0), [], inputs=above.sha256)
    commit(corpus, ("clean", "none", 0), [], inputs=above.sha256)
    assert report_of(corpus)["funnel"]["total"]["clean"]["rows"] == 0


def test_a_corpus_that_failed_altogether_says_why(tmp_path):
    corpus = Corpus(str(tmp_path))
    commit(corpus, ("raw", "gone", 0), lost_rows("gone", 40))
    found = report_of(corpus)
    assert found["headline"]["images"] == 0
    assert found["funnel"]["total"]["raw"]["failed"] == {"http_404": 40}
    assert found["images"]["short_side"]["percentiles"]["p50"] is None


def test_fifty_sources_fit_on_a_page(tmp_path):
    shape = {f"source-{number:02d}": [25] for number in range(50)}
    corpus, _ = build(tmp_path, shape)
    found = report_of(corpus)
    assert len(found["funnel"]["sources"]) == 50
    assert len(found["explorer"]["sources"]) == 12
    assert found["explorer"]["sources"][-1] == "(other sources)"
    scored = found["headline"]["captions_scored"].values()
    assert sum(cell[-1] for cell in found["explorer"]["cells"]) == sum(scored)
    page = read(corpus, "index.html")
    assert all(source in page for source in shape)
    assert len(page.encode()) < MAX_PAGE_BYTES


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (1, "No shard has been captioned and scored yet."),
        (2, "No shard has been selected from yet."),
    ],
)
def test_a_corpus_that_is_not_through_says_what_is_missing(tmp_path, stages, said):
    corpus, _ = build(tmp_path, {"cc3m": [20, 20]}, stages=stages)
    found = report_of(corpus)
    assert said in found["missing"]
    assert said in read(corpus, "index.html")
    assert found["headline"]["samples_kept"] is None
    assert "no sample has been selected yet" in read(corpus, "README.md")


def test_shards_that_wait_are_stale_or_damaged_are_named(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [10, 10, 10]})
    Path(tmp_path, "clean/cc3m/00002.json").unlink()
    first = corpus.record("raw", "cc3m", 0)
    commit(corpus, ("raw", "cc3m", 0), lost_rows("cc3m", 10), replace=first)
    Path(tmp_path, "captions/cc3m/00001.json").write_text("{ torn")
    stages = report_of(corpus)["stages"]
    assert stages["captions"]["stale"] == ["captions/cc3m/00000"]
    assert stages["captions"]["damaged"] == ["captions/cc3m/00001.json"]
    assert stages["clean"]["waiting"] == 1
    lines = "\n".join(json.loads(read(corpus, "report.json"))["missing"])
    assert "captions/cc3m/00001.json is damaged" in lines
    assert "1 captions shards are stale" in lines


def test_a_damaged_run_file_is_told_and_is_no_obstacle(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [3]})
    with open(tmp_path / "run.yaml", "a", encoding="utf-8") as stream:
        stream.write("changed: true\n")
    found = report_of(corpus)
    assert "does not match the hash" in found["provenance"]["recipe_problem"]


def test_results_that_are_no_json_are_named(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [3]})
    (tmp_path / "report").mkdir()
    (tmp_path / "report/ablation.json").write_text("{ torn")
    with pytest.raises(ValueError, match=r"report/ablation.json is not JSON"):
        build_report(corpus)


def test_the_same_corpus_gives_the_same_page_but_for_the_moment(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [40, 40], "sbu": [30]}, texts=HOSTILE)
    for path in tmp_path.rglob("*.json"):
        os.utime(path, (1_700_000_000, 1_700_000_000))  # so that no shard is of the same moment
    pages = []
    for _ in range(2):
        found = report_of(corpus)
        page = read(corpus, "index.html").replace(found["made_at"], "")
        pages.append(page.replace(found["made_at"][:16].replace("T", " "), ""))
    assert pages[0] == pages[1]


def test_a_report_changes_nothing_else(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [20]})

    def state():
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {
            str(path): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in files
            if "report" not in path.parts
        }

    before = state()
    build_report(corpus)
    assert state() == before
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html",
        "report.json",
        "README.md",
        "croissant.json",
    }


def test_a_corpus_elsewhere_has_the_same_numbers_as_on_a_disk(tmp_path):
    local, _ = build(tmp_path / "x", {"cc3m": [30], "coco": [10]}, texts=HOSTILE)
    remote, _ = build("memory://somewhere/x", {"cc3m": [30], "coco": [10]}, texts=HOSTILE)
    first, second = report_of(local), report_of(remote)
    for name in ("funnel", "scores", "explorer", "texts", "images", "licences", "stages"):
        assert first[name] == second[name], name
    assert read(remote, "index.html").count("data:image/webp") > 10


def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path):
    corpus, _ = build(tmp_path / "a[b]*c?'d", {"cc3m": [5]})
    assert report_of(corpus)["headline"]["rows_in"] == 5


def test_a_shard_in_the_middle_of_a_commit_is_read_under_its_staging_name(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [8]})
    record = corpus.record("raw", "cc3m", 0)
    staged = f"00000.parquet.{record.files['parquet'].sha256[:16]}"
    os.rename(tmp_path / "raw/cc3m/00000.parquet", tmp_path / "raw/cc3m" / staged)
    assert report_of(corpus)["headline"]["rows_in"] == 8


REPLACER = """
import sys
sys.path.insert(0, {tests!r})
from report_corpora import Maker, commit, drawing
from pipeline.corpus import Corpus
corpus, number = Corpus({root!r}), 0
while True:
    number += 1
    for index in range(4):
        record = corpus.record("raw", "busy", index)
        maker = Maker(number)
        rows = [maker.raw_row("busy", f"{{index:05d}}{{n:04d}}", "web") for n in range(20)]
        images = {{r["key"]: drawing(1) for r in rows if r["verdict"] == "kept"}}
        commit(corpus, ("raw", "busy", index), rows, images=images, replace=record)
        print(number, flush=True)
"""


def test_a_running_job_that_replaces_its_shards_is_reported_on(tmp_path):
    program = REPLACER.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as job:
        try:
            for _ in range(4):
                job.stdout.readline()
            for _ in range(6):
                found = report_of(Corpus(str(tmp_path)))
                total = found["funnel"]["total"]["raw"]
                assert total["rows"] == found["stages"]["raw"]["rows"] == 80
                assert (
                    total["kept"] + sum(n for v in ("dropped", "failed") for n in total[v].values())
                    == 80
                )
            assert job.poll() is None
        finally:
            job.kill()


def test_shards_that_were_replaced_since_are_noticed_and_links_still_hold_the_old_ones(tmp_path):
    corpus, _ = build(tmp_path / "corpus", {"cc3m": [10]}, stages=1)
    snapshot = Snapshot.take(corpus)
    pinned = snapshot.pinned(str(tmp_path / "links"))
    assert not snapshot.has_changed(corpus)
    rows = lost_rows("cc3m", 3)
    commit(corpus, ("raw", "cc3m", 0), rows, replace=corpus.record("raw", "cc3m", 0))
    assert snapshot.has_changed(corpus)
    with Ledgers.open(corpus, pinned) as ledgers:
        assert ledgers.row("SELECT count(*) FROM raw") == (10,)


def test_a_ledger_that_is_damaged_is_named(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [30]})
    path = tmp_path / "raw/cc3m/00000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"raw-cc3m-00000.parquet.*capfilt verify"):
        build_report(corpus)


def test_what_a_killed_report_left_is_removed_by_the_next(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [3]})
    (tmp_path / "report/.ledgers.dead").mkdir(parents=True)
    build_report(corpus)
    assert not (tmp_path / "report/.ledgers.dead").exists()


# The gallery.


def shown(corpus):
    with Ledgers.open(corpus, Snapshot.take(corpus)) as ledgers:
        return examples(corpus, ledgers)


def test_the_gallery_shows_every_kind_and_no_more_than_a_page_holds(tmp_path):
    corpus, made = build(tmp_path, {"laion": [150, 150], "cc3m": [150]})
    found = shown(corpus)
    counts = Counter(example.group.value for example in found)
    assert set(counts) == {"kept", "dropped", "borderline"}
    assert max(counts.values()) <= MAX_SAMPLES
    assert all(example.thumbnail for example in found)
    rows = {(row["source"], row["key"]): row for row in made["clean"]}
    for example in found:
        row = rows[example.source, example.key]
        assert example.verdict == row["verdict"]
        assert [c["text"] for c in example.captions] == [c["text"] for c in row["captions"]]


def test_the_gallery_shows_the_image_that_belongs_to_the_key(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [60]})
    found = shown(corpus)
    assert {example.verdict for example in found} == {"kept", "dropped"}
    for example in found:
        assert example.thumbnail == thumbnail(drawing(f"{example.source}{example.key}"))


def test_a_corpus_without_its_raw_shards_still_shows_what_was_kept(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [60]})
    for path in sorted((tmp_path / "raw").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    found = shown(corpus)
    assert all((example.thumbnail is not None) == (example.verdict == "kept") for example in found)
    report = report_of(corpus)
    assert report["headline"]["rows_in"] == 60
    assert report["headline"]["images"] is None
    assert "The raw shards are not here any more" in report["missing"][0]


@pytest.mark.parametrize("stages", [1, 2])
def test_before_selection_examples_are_undecided(tmp_path, stages):
    corpus, _ = build(tmp_path, {"cc3m": [40]}, stages=stages)
    found = shown(corpus)
    assert {example.group.value for example in found} == {"undecided"}
    assert all(example.thumbnail and example.captions for example in found)


def test_a_few_shards_of_many_sources_are_looked_at(tmp_path):
    corpus, _ = build(tmp_path, {f"s{n}": [2, 2] for n in range(14)}, stages=1)
    chosen = spread(Snapshot.take(corpus).shards["raw"])
    assert len(chosen) == MAX_SHARDS
    assert len({shard.record.source for shard in chosen}) == MAX_SHARDS


def judged(verdict, reason="", **scores):
    return {"origin": "web", "itm": None, "clip": None, **scores} | {
        "verdict": verdict,
        "reason": reason,
    }


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([judged("kept", itm=0.55)], True),
        ([judged("kept", itm=0.95)], False),
        ([judged("dropped", "itm_below_threshold", itm=0.45)], True),
        ([judged("dropped", "too_short", itm=0.5)], False),
        ([judged("kept", clip=0.3), judged("dropped", "below_top_k", clip=0.295)], True),
        ([judged("kept", clip=0.3), judged("dropped", "below_top_k", clip=0.2)], False),
        ([judged("kept", itm=0.5) | {"origin": "human"}], False),
    ],
)
def test_borderline_is_what_a_slightly_different_score_would_have_decided_otherwise(
    captions, expected
):
    assert is_borderline(captions, 0.5) is expected


@pytest.mark.parametrize("data", [b"", b"no image", drawing(1)[:200], b"<svg onload=x>"])
def test_what_is_no_image_has_no_thumbnail(data):
    assert thumbnail(data) is None


def test_a_thumbnail_is_small_and_bare():
    picture = Image.open(io.BytesIO(thumbnail(drawing(3))))
    assert picture.format == "WEBP"
    assert max(picture.size) == SIDE
    assert not picture.getexif()


# Texts of strangers.


@given(st.text(st.characters(), max_size=60))
def test_a_visible_text_hides_nothing_and_says_all_that_is_printable(text):
    shown_text = visible(text)
    assert all(
        char.isprintable() or char in "\u200c\u200d\u00a0\u3000" or char.isspace()
        for char in shown_text
    )
    assert not set(shown_text) & {"\n", "\u202e", "\u2066", "\u200e", "\x00", "\u2028"}
    if all(char.isalnum() for char in text):
        assert shown_text == text


def test_a_long_text_is_cut_and_says_so():
    assert visible("x" * 501) == "x" * 500 + "… (+1 characters)"


def test_marks_do_not_pile_up():
    assert len(visible("h" + "\u0301" * 50)) == 5


@pytest.mark.parametrize(
    ("url", "is_linked"),
    [
        ("https://example.org/a.jpg?x=1#y", True),
        ("HTTP://example.org/", True),
        ("javascript:alert(1)", False),
        ("data:text/html,<script>", False),
        ("//example.org/x", False),
        ("https:///x", False),
        ("https://user:password@example.org/", False),
        ("https://example.org/\u202egpj.exe", False),
        ("https://exаmple.org/", False),  # a Cyrillic letter
        ("https://[bad", False),
        ("java\nscript:alert(1)", False),
        ("", False),
        (None, False),
    ],
)
def test_only_plain_web_addresses_are_linked(url, is_linked):
    assert (web_link(url) is not None) is is_linked


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (0, 9, "0.0%"),
        (1, 10**6, "<0.1%"),
        (999_999, 10**6, ">99.9%"),
        (9, 9, "100.0%"),
        (1, 0, "–"),
    ],
)
def test_a_share_that_is_not_all_or_nothing_never_looks_like_it(part, whole, expected):
    assert share(part, whole) == expected


def test_sizes_and_times_are_said_in_the_unit_that_fits():
    assert (size(5), size(1536), size(3 * 2**30)) == ("5 B", "1.5 KiB", "3.0 GiB")
    times = [duration(s) for s in (5, 61, 7260, 90_000)]
    assert times == ["5 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]


# The card.


def test_the_card_has_a_header_that_the_hub_reads_and_the_counts(tmp_path):
    yaml = pytest.importorskip("yaml")
    corpus, made = build(tmp_path / 'a "name": [x]', {"laion": [40], "coco": [10]}, texts=HOSTILE)
    found = report_of(corpus)
    card = read(corpus, "README.md")
    _, header, body = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["pretty_name"] == 'a "name": [x]'
    assert fields["size_categories"] == ["n<1K"]
    assert fields["license"] == "other"
    kept = sum(row["verdict"] == "kept" for row in made["clean"])
    assert f"| all | 50 | {found['headline']['images']} | {kept} |" in body
    assert "<b>" not in body.replace("\\<b\\>", "")


def test_croissant_names_files_and_columns_that_exist(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [10]})
    build_report(corpus)
    described = json.loads(read(corpus, "croissant.json"))
    assert described["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    sets = {entry["@id"]: entry for entry in described["distribution"]}
    for name in ("ledgers", "shards"):
        assert list(tmp_path.glob(sets[name]["includes"]))
    columns = {f["source"]["extract"]["column"] for f in described["recordSet"][0]["field"]}
    with Ledgers.open(corpus, Snapshot.take(corpus)) as ledgers:
        ledgers.rows(f"SELECT {', '.join(sorted(columns))} FROM clean LIMIT 1")


def test_an_address_of_a_page_stays_the_same_while_it_is_replaced(tmp_path):
    """A reader sees the old page or the new one."""
    corpus, _ = build(tmp_path, {"cc3m": [4]})
    build_report(corpus)
    first = (tmp_path / "report/index.html").stat().st_ino
    build_report(corpus)
    assert (tmp_path / "report/index.html").stat().st_ino != first


def test_the_recipe_is_shown_line_by_line(tmp_path):
    corpus, _ = build(tmp_path, {"cc3m": [2]})
    build_report(corpus)
    page = read(corpus, "index.html")
    assert re.search(r"name: example\nseed: 7\nhostile: &#34;&lt;script&gt;", page)
