"""Raw shards to caption sidecars: every row accounted for, the same bytes however it is done."""

import logging
import math
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import score_jobs as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_jobs import KINDS, LOST, Row

from pipeline.corpus import Corpus
from pipeline.download_row import RAW_SCHEMA
from pipeline.image_decode import decode
from pipeline.image_header import read_header
from pipeline.ledger import BASE_FIELDS, LedgerWriter
from pipeline.sample import ShardError
from pipeline.score import OtherContentError, ScoringStoppedError, ShardScorer, Watch
from pipeline.score_config import ScoreConfig
from pipeline.score_rows import CAPTIONS_SCHEMA, bad_score
from pipeline.tar import TarWriter
from pipeline.verify import verify

MIXED = tuple(Row(kind, number) for number, kind in enumerate(KINDS))
# What becomes of each kind of row: origin, index, verdict and reason of its rows in the sidecar.
WEB, SYNTHETIC = ("web", 0, "kept", ""), ("synthetic", 0, "kept", "")
EXPECTED = {
    "web": [WEB, SYNTHETIC],
    "png": [WEB, SYNTHETIC],
    "two_captions": [WEB, ("web", 1, "kept", ""), SYNTHETIC],
    "turned": [WEB, ("web", 1, "kept", ""), SYNTHETIC],
    "empty_caption": [("web", 0, "dropped", "empty_caption"), SYNTHETIC],
    "no_caption": [SYNTHETIC],
    "long_caption": [("web", 0, "dropped", "caption_too_long"), SYNTHETIC],
    "human": [
        ("human", 0, "kept", ""),
        ("human", 1, "kept", ""),
        ("human", 2, "dropped", "empty_caption"),
    ],
    "human_without": [(None, None, "dropped", "no_caption")],
    "truncated": [(None, None, "failed", "truncated_image")],
    "no_image": [(None, None, "failed", "not_an_image")],
    "huge": [(None, None, "dropped", "too_many_pixels")],
    "line": [(None, None, "dropped", "aspect_too_large")],
    "bad_json": [(None, None, "failed", "bad_metadata")],
    "not_utf8": [(None, None, "failed", "bad_text")],
    "two_images": [(None, None, "failed", "no_single_image")],
    "failed": [],
    "dropped": [],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return str(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def captioner(words):
    return jobs.make_captioner(words)


@pytest.fixture(scope="module")
def scorer(words):
    return jobs.make_scorer(words)


@pytest.fixture
def corpus(tmp_path):
    return Corpus(str(tmp_path / "corpus"))


@pytest.fixture
def score(captioner, scorer):
    """Score a raw shard, with the tiny models unless others are given."""

    def run(corpus, raw, config=None, watch=None, **models):
        models = {"captioner": captioner, "scorer": scorer} | models
        config = config or ScoreConfig(batch_size=8)
        return ShardScorer(corpus, **models, config=config, seed=jobs.SEED, watch=watch).score(raw)

    return run


def sidecar(corpus, record):
    with corpus.open(record, "parquet") as stream:
        return pq.read_table(stream).to_pylist()


def kept_keys(rows, index=0):
    return [jobs.key_of(index, at) for at, row in enumerate(rows) if row.kind not in LOST]


def shown(row):
    return row["origin"], row["index"], row["verdict"], row["reason"]


# --- rows ----------------------------------------------------------------------------------------


def test_each_kind_of_row_becomes_what_it_should(corpus, score):
    assert set(EXPECTED) == set(KINDS)
    done = score(corpus, jobs.commit_raw(corpus, MIXED))
    rows = sidecar(corpus, done.record)
    for position, raw in enumerate(MIXED):
        key = jobs.key_of(0, position)
        assert [shown(row) for row in rows if row["key"] == key] == EXPECTED[raw.kind], raw.kind
    assert [fault for fault in verify(corpus) if fault.file != "run.yaml"] == []


def test_a_row_says_what_made_it_and_what_the_models_say(corpus, score, captioner):
    raw = jobs.commit_raw(corpus, [Row("web", 5), Row("no_image"), Row("empty_caption", 6)])
    web, synthetic, lost, empty, _ = sidecar(corpus, score(corpus, raw).record)
    assert list(web) == CAPTIONS_SCHEMA.names
    assert {field.name for field in BASE_FIELDS} < set(web)
    assert (web["key"], web["source"], web["url"]) == ("000000000", jobs.SOURCE, "http://host/5")
    assert (web["text"], web["num_tokens"], web["seed"]) == (jobs.words(5), None, None)
    weights = ("captioner", "filter", "clip_model")
    assert [web[name] for name in weights] == [None, "filter-weights", "clip-weights"]
    assert [synthetic[name] for name in weights] == [
        "captioner-weights", "filter-weights", "clip-weights"
    ]  # fmt: skip
    assert synthetic["seed"] == jobs.SEED
    assert 0 < synthetic["num_tokens"] <= captioner.config.max_length
    assert len(synthetic["text"].split()) == synthetic["num_tokens"]
    for row in (web, synthetic):
        assert 0 <= row["itm"] <= 1
        assert -1 <= row["itc"] <= 1
        assert -1 <= row["clip"] <= 1
    for row in (lost, empty):
        assert [row[name] for name in ("itm", "itc", "clip", *weights)] == [None] * 6
    assert lost["text"] is None


def test_scores_are_the_scorers_own_for_this_image_and_text(corpus, score, scorer):
    raw = jobs.commit_raw(corpus, [Row("web", 1), Row("no_image"), Row("two_captions", 9)])
    rows = sidecar(corpus, score(corpus, raw).record)[3:]
    data = jobs.picture(9)
    pixels = decode(data, read_header(data), min_width=40, min_height=30).pixels
    [own] = scorer.score([scorer.preprocess(pixels)], [[row["text"] for row in rows]])
    for row, expected in zip(rows, own, strict=True):
        found = [row["itm"], row["itc"], row["clip"]]
        assert found == pytest.approx([expected.itm, expected.itc, expected.clip], abs=1e-6)


def test_several_captions_of_an_image_stand_in_order_and_differ(corpus, score, words):
    raw = jobs.commit_raw(corpus, [Row("two_captions", 3)])
    rows = sidecar(
        corpus, score(corpus, raw, captioner=jobs.make_captioner(words, num_captions=5)).record
    )
    assert [shown(row)[:2] for row in rows] == [
        ("web", 0), ("web", 1), *(("synthetic", index) for index in range(5))
    ]  # fmt: skip
    assert len({row["text"] for row in rows}) == 7


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=12),
    batch_size=st.integers(1, 5),
    num_decoders=st.integers(1, 3),
)
def test_rows_in_are_rows_out(captioner, scorer, tmp_path_factory, kinds, batch_size, num_decoders):
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    rows = [Row(kind, number) for number, kind in enumerate(kinds)]
    raw = jobs.commit_raw(corpus, rows)
    config = ScoreConfig(batch_size=batch_size, num_decoders=num_decoders)
    done = ShardScorer(corpus, captioner, scorer, config, seed=jobs.SEED).score(raw)
    found = sidecar(corpus, done.record)
    assert list(dict.fromkeys(row["key"] for row in found)) == kept_keys(rows)
    assert [shown(row) for row in found] == [each for row in rows for each in EXPECTED[row.kind]]
    kept = sum(row["verdict"] == "kept" for row in found)
    assert done.record.counts.kept == kept == sum(done.outcome.captions.values())
    assert done.record.rows_in == len(found) == kept + done.outcome.causes.total()
    assert done.outcome.num_images == raw.counts.kept == done.record.stats["images"]


def test_a_shard_without_kept_rows_becomes_an_empty_sidecar(corpus, score):
    raw = jobs.commit_raw(corpus, [Row("failed"), Row("dropped")])
    nothing = jobs.commit_raw(corpus, [], index=1)
    for record in (raw, nothing):
        done = score(corpus, record)
        assert sidecar(corpus, done.record) == []
        assert done.record.rows_in == 0
        assert done.record.inputs == record.sha256
        assert list(done.outcome.lines())


def test_without_a_captioner_or_a_scorer_their_columns_stay_empty(corpus, score, scorer):
    rows = [Row("web", 1), Row("no_caption", 2)]
    unwritten = score(corpus, jobs.commit_raw(corpus, rows), captioner=None)
    found = sidecar(corpus, unwritten.record)
    assert [shown(row) for row in found] == [WEB, (None, None, "dropped", "no_caption")]
    assert found[0]["itm"] is not None
    unscored = score(corpus, jobs.commit_raw(corpus, rows, index=1), scorer=None)
    found = sidecar(corpus, unscored.record)
    assert [shown(row) for row in found] == [WEB, SYNTHETIC, SYNTHETIC]
    assert {row["itm"] for row in found} == {row["filter"] for row in found} == {None}
    assert unwritten.record.fingerprint != unscored.record.fingerprint


# --- the same bytes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(captioner, scorer, tmp_path_factory):
    """Two shards scored in one way, and every byte of them."""
    root = str(tmp_path_factory.mktemp("reference"))
    _score_two(Corpus(root), captioner, scorer, ScoreConfig(batch_size=8))
    return jobs.tree(root)


def _score_two(corpus, captioner, scorer, config):
    raws = [jobs.commit_raw(corpus, jobs.rows_of_shard(index), index) for index in (0, 1)]
    shard_scorer = ShardScorer(corpus, captioner, scorer, config, seed=jobs.SEED)
    return [shard_scorer.score(raw) for raw in raws]


@pytest.mark.parametrize(
    "pace",
    [
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 8, "num_decoders": 4},
        {"batch_size": 3, "num_decoders": 1},
        {"batch_size": "auto"},
    ],
    ids=str,
)
def test_neither_batch_size_nor_threads_change_a_byte(reference, captioner, scorer, tmp_path, pace):
    _score_two(Corpus(str(tmp_path)), captioner, scorer, ScoreConfig(**pace))
    assert jobs.tree(tmp_path) == reference


def test_a_caption_does_not_change_with_its_neighbours(corpus, score):
    alone, among = [Row("web", 3)], [Row("web", 3), *MIXED]
    first = sidecar(corpus, score(corpus, jobs.commit_raw(corpus, alone)).record)
    again = Corpus(corpus.root + "-again")
    assert sidecar(again, score(again, jobs.commit_raw(again, among)).record)[:2] == first


def test_a_corpus_that_is_not_on_a_disk_gets_the_same_files(reference, captioner, scorer, tmp_path):
    corpus = Corpus(f"memory://{tmp_path.name}-score")
    _score_two(corpus, captioner, scorer, ScoreConfig(batch_size=8))
    fs, root = corpus.store.fs, corpus.store.full("")
    assert {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)} == reference


# --- memory --------------------------------------------------------------------------------------


class SmallDevice:
    """A model on a device without memory for more than so many images."""

    def __init__(self, model, max_images):
        self._model = model
        self._max_images = max_images
        self.sizes = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def caption(self, pixels, keys):
        return self._within(len(keys), self._model.caption, pixels, keys)

    def score(self, images, texts):
        return self._within(len(images), self._model.score, images, texts)

    def _within(self, num_images, call, *arguments):
        self.sizes.append(num_images)
        if num_images > self._max_images:
            raise torch.OutOfMemoryError(f"no memory for {num_images} images")
        return call(*arguments)


@pytest.mark.parametrize("small", ["captioner", "scorer"])
def test_out_of_memory_halves_the_batch_and_changes_no_byte(
    small, reference, captioner, scorer, tmp_path, caplog
):
    models = {"captioner": captioner, "scorer": scorer}
    models[small] = SmallDevice(models[small], 2)
    with caplog.at_level(logging.WARNING):
        first, second = _score_two(
            Corpus(str(tmp_path)), **models, config=ScoreConfig(batch_size=8)
        )
    assert jobs.tree(tmp_path) == reference
    assert (first.outcome.num_out_of_memory, first.outcome.batch_size) == (2, 2)
    assert (second.outcome.num_out_of_memory, second.outcome.batch_size) == (0, 2)
    told = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(told) == 2
    assert "raw/web/00000" in told[0]
    assert "8 images, going on with 4" in told[0]
    assert max(models[small].sizes[2:]) == 2


def test_a_device_too_small_for_one_image_fails_the_shard(corpus, score, captioner):
    raw = jobs.commit_raw(corpus, [Row("web", 1)] * 3)
    with pytest.raises(ShardError, match=r"raw/web/00000, sample 000000000.*one image") as caught:
        score(corpus, raw, captioner=SmallDevice(captioner, 0))
    assert "smaller model" in str(caught.value)
    assert corpus.record("captions", jobs.SOURCE, 0) is None


# --- what fails a shard --------------------------------------------------------------------------


def poisoned(words, name):
    """Return a scorer with one weight that is no number."""
    scorer = jobs.make_scorer(words)
    part = scorer._clip if name.startswith("clip.") else scorer._filter
    weight = dict(part._model.named_parameters())[name.removeprefix("clip.")]
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    return scorer


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("itm_head.weight", "itm is nan, from the filter model with weights filter-weights"),
        ("text_proj.weight", "itc is nan, from the filter model with weights filter-weights"),
        ("clip.visual_projection.weight", "clip is nan, from the clip model with weights clip-"),
    ],
)
def test_a_score_that_is_no_number_names_shard_key_and_model(
    corpus, score, words, weight, expected
):
    raw = jobs.commit_raw(corpus, [Row("no_image"), Row("web", 3), Row("web", 4)])
    with pytest.raises(ShardError) as caught:
        score(corpus, raw, scorer=poisoned(words, weight))
    message = str(caught.value)
    assert "shard raw/web/00000, sample 000000001, web caption 0" in message
    assert expected in message
    assert "float32" in message
    assert corpus.record("captions", jobs.SOURCE, 0) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_bad_score(value):
    assert bad_score({"itm": 0.5, "itc": value, "clip": None}) == "itc"
    assert bad_score({"itm": 0.5, "itc": None, "clip": -1.0}) is None


def test_a_bit_that_flipped_on_disk_fails_the_shard(corpus, score):
    raw = jobs.commit_raw(corpus, [Row("web", number) for number in range(5)])
    path = Path(corpus.local_path(raw, "tar"))
    data = bytearray(path.read_bytes())
    data[data.index(jobs.words(2).encode())] ^= 1  # a letter of a caption
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"raw/web/00000: its tar does not have the hash"):
        score(corpus, raw)
    assert corpus.record("captions", jobs.SOURCE, 0) is None


def test_a_tar_cut_short_fails_the_shard(corpus, score):
    raw = jobs.commit_raw(corpus, [Row("web", number) for number in range(5)])
    path = Path(corpus.local_path(raw, "tar"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"raw/web/00000.*has .* bytes, not"):
        score(corpus, raw)


def committed_with(corpus, tar_keys, ledger_keys):
    """Commit a raw shard whose tar and ledger need not agree."""
    with corpus.writer("raw", jobs.SOURCE, 0, fingerprint="raw") as writer:
        with open(writer.path("tar"), "wb") as stream, TarWriter(stream) as tar:
            for key in tar_keys:
                tar.write(key, jobs.members_of(key, Row()))
        with LedgerWriter(writer.path("parquet"), RAW_SCHEMA) as ledger:
            for key in ledger_keys:
                row = {"key": key, "source": jobs.SOURCE, "verdict": "kept", "reason": ""}
                ledger.write(dict.fromkeys(RAW_SCHEMA.names) | row)
        return writer.commit(rows_in=ledger.num_rows, counts=ledger.counts)


@pytest.mark.parametrize(
    ("tar_keys", "ledger_keys", "problem"),
    [
        (["1", "3"], ["1", "2", "3"], "its tar has no sample 2"),
        (["1"], ["1", "2"], "its tar has no sample 2"),
        (["1", "2"], ["1"], "its ledger has not kept sample 2"),
    ],
)
def test_a_tar_and_a_ledger_that_disagree_fail_the_shard(
    corpus, score, tar_keys, ledger_keys, problem
):
    raw = committed_with(corpus, tar_keys, ledger_keys)
    with pytest.raises(ShardError, match=f"raw/web/00000: {problem}"):
        score(corpus, raw)


def test_what_should_not_happen_while_decoding_names_the_sample(corpus, score, scorer):
    class Faulty(SmallDevice):
        def preprocess(self, pixels):
            raise KeyError("a bug")

    raw = jobs.commit_raw(corpus, [Row("no_image"), Row("web", 3)])
    with pytest.raises(ShardError, match=r"sample 000000001: KeyError: 'a bug'") as caught:
        score(corpus, raw, scorer=Faulty(scorer, 8))
    assert isinstance(caught.value.__cause__, KeyError)
    assert no_thread_left()


def test_only_raw_shards_are_scored(corpus, score):
    record = score(corpus, jobs.commit_raw(corpus, [Row()])).record
    with pytest.raises(ValueError, match="captions/web/00000 is not of stage 'raw'"):
        score(corpus, record)


# --- resuming ------------------------------------------------------------------------------------


class Untouchable(SmallDevice):
    def caption(self, pixels, keys):
        raise AssertionError("there was nothing to caption")


def test_a_sidecar_that_is_there_is_left_alone(corpus, score, captioner):
    raw = jobs.commit_raw(corpus, MIXED)
    first = score(corpus, raw)
    before = jobs.tree(corpus.root)
    again = score(corpus, raw, captioner=Untouchable(captioner, 8))
    assert (first.is_new, again.is_new) == (True, False)
    assert again.record == first.record
    assert again.outcome.num_images == 0
    assert jobs.tree(corpus.root) == before


def test_a_stale_sidecar_is_replaced(corpus, score):
    raw = jobs.commit_raw(corpus, [Row("web", 1), Row("failed", 2)])
    stale = score(corpus, raw).record
    retried = jobs.commit_raw(corpus, [Row("web", 1), Row("web", 2)], replace=raw)
    done = score(corpus, retried)
    assert done.is_new
    assert done.record.inputs == retried.sha256 != stale.inputs
    assert corpus.record("captions", jobs.SOURCE, 0) == done.record
    assert len(sidecar(corpus, done.record)) == 4


def test_other_settings_are_refused_by_name_and_nothing_is_changed(corpus, score, words):
    raw = jobs.commit_raw(corpus, [Row("web", 1)])
    score(corpus, raw)
    before = jobs.tree(corpus.root)
    other = jobs.make_captioner(words, top_p=0.5)
    other.fingerprint = "other-weights"
    with pytest.raises(OtherContentError) as caught:
        score(corpus, raw, captioner=other, config=ScoreConfig(max_pixels=1000))
    assert caught.value.differences == {
        "captioner.top_p": (0.9, 0.5),
        "score.max_pixels": (50_000_000, 1000),
        "weights.captioner": ("captioner-weights", "other-weights"),
    }
    assert "captions/web/00000" in str(caught.value)
    assert "captioner.top_p was 0.9, now 0.5" in str(caught.value)
    assert jobs.tree(corpus.root) == before


def test_the_pace_is_no_part_of_the_content(captioner, scorer, corpus):
    def fingerprint(**config):
        return ShardScorer(
            corpus, captioner, scorer, ScoreConfig(**config), seed=jobs.SEED
        ).fingerprint

    assert fingerprint(batch_size=2, num_decoders=7, max_batch_size=9) == fingerprint()
    assert len(fingerprint()) == 16
    assert fingerprint(max_pixels=5) != fingerprint()


# --- watching ------------------------------------------------------------------------------------


def no_thread_left():
    return not [t for t in threading.enumerate() if t.name.startswith(("decode", "read-shard"))]


def test_a_watch_hears_of_each_image_in_order(corpus, score):
    heard = []
    raw = jobs.commit_raw(corpus, MIXED)
    done = score(corpus, raw, watch=Watch(on_row=heard.append))
    assert [rows[0]["key"] for rows in heard] == kept_keys(MIXED)
    assert [dict(row) for rows in heard for row in rows] == [
        pytest.approx(row) for row in sidecar(corpus, done.record)
    ]


def test_scoring_stops_when_asked_and_leaves_no_shard_and_no_thread(corpus, score):
    heard = []
    raw = jobs.commit_raw(corpus, [Row("web", number) for number in range(20)])
    watch = Watch(on_row=heard.append, should_stop=lambda: len(heard) >= 4)
    with pytest.raises(ScoringStoppedError):
        score(corpus, raw, ScoreConfig(batch_size=2), watch)
    assert 4 <= len(heard) < 20
    assert no_thread_left()
    assert corpus.record("captions", jobs.SOURCE, 0) is None
    assert score(corpus, raw).is_new


def test_the_outcome_says_where_the_time_went(corpus, score):
    raw = jobs.commit_raw(corpus, [Row("web", number) for number in range(30)])
    outcome = score(corpus, raw).outcome
    on_one_thread = ("wait", "caption", "score", "write")
    assert all(outcome.shares[name] > 0 for name in (*on_one_thread, "read", "decode"))
    assert 0.8 < sum(outcome.shares[name] for name in on_one_thread) <= 1
    assert outcome.images_per_second == pytest.approx(30 / outcome.elapsed_seconds)
    text = "\n".join(outcome.lines())
    assert "30 images, 30 with captions (30 synthetic, 30 web)" in text
