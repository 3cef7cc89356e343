"""The loader on real shards: exact order for any world, workers and history; faults; bad input."""

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_corpora import (
    Item,
    demo_corpus,
    failed_item,
    human_item,
    photo,
    web_item,
    write_clean,
    write_web,
)
from loader_process import CONFIG, read_step, seen_in

from pipeline.corpus import Corpus
from pipeline.ledger import LedgerWriter, ledger_schema
from pipeline.loader import Loader, LoaderConfig, LoaderError
from pipeline.loading.config import SourceConfig
from pipeline.sample import Caption, Origin, Sample
from pipeline.tar import TarWriter

NUM_RECORDS = 23 + 2 * 5  # of the demo corpus
INLINE = CONFIG.model_copy(update={"num_workers": 0})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return demo_corpus(tmp_path_factory.mktemp("loader") / "corpus")


@pytest.fixture(scope="module")
def undisturbed(corpus):
    """What a run of one rank sees in each of its first steps."""
    with Loader(corpus, INLINE) as loader:
        return [read_step([loader]) for _ in range(40)]


def with_options(**options):
    return LoaderConfig.model_validate({**INLINE.model_dump(), **options})


def keys_of(loader, num_steps):
    return [key for _, batch in zip(range(num_steps), loader, strict=False) for key in batch.keys]


# Order and position


def test_an_epoch_shows_every_record_once(corpus):
    with Loader(corpus, with_options(global_batch_size=NUM_RECORDS)) as loader:
        for epoch in range(3):
            batch = next(loader)
            assert batch.epoch == epoch
            texts = Counter(batch.texts)
            human = [f"text {n} of 00000000{k}" for k in range(2) for n in range(5)]
            assert {text: texts[text] for text in human} == dict.fromkeys(human, 1)
            web = Counter(key for key in batch.keys if key.startswith("web/"))
            assert len(web) == 23
            assert set(web.values()) == {1}


def test_the_rest_of_an_epoch_shares_a_batch_with_the_next(corpus):
    with Loader(corpus, INLINE) as loader:
        assert loader.steps_before(1) == 9  # 33 records in batches of 4
        keys = keys_of(loader, 9)
    epoch, _ = Counter(keys[:NUM_RECORDS]), keys[NUM_RECORDS:]
    assert len(epoch) == 23 + 2
    assert len(keys) == 36


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]),
                       st.integers(0, 4)), min_size=1, max_size=4)
)  # fmt: skip
def test_any_history_of_worlds_sees_the_same_samples(corpus, undisturbed, history):
    state, step = None, 0
    for (world_size, micro_batches), num_steps in history:
        options = {"world_size": world_size, "micro_batches": micro_batches}
        loaders = [Loader(corpus, INLINE, rank=rank, **options) for rank in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(num_steps):
            assert read_step(loaders, micro_batches) == undisturbed[step]
            step += 1
        state = loaders[0].state_dict()
        assert state["step"] == step


@given(st.integers(0, 39))
def test_any_step_can_be_gone_to(corpus, undisturbed, step):
    with Loader(corpus, INLINE) as loader:
        assert read_step([loader.at(step)]) == undisturbed[step]


def test_batches_are_the_same_for_any_number_of_workers(corpus, undisturbed):
    for num_workers in (1, 2):
        with Loader(corpus, with_options(num_workers=num_workers)) as loader:
            assert [read_step([loader]) for _ in range(12)] == undisturbed[:12]
            assert read_step([loader.at(3)]) == undisturbed[3]


def test_an_incomplete_step_is_repeated(corpus, undisturbed):
    with Loader(corpus, INLINE, micro_batches=2) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state_dict()
        assert state["step"] == 2
        loader.load_state_dict(state)
        assert read_step([loader], micro_batches=2) == undisturbed[2]


def test_loading_leaves_the_generator_of_training_alone(corpus):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with Loader(corpus, INLINE) as loader:
        next(loader)
    assert torch.equal(torch.rand(3), expected)


def test_a_seed_decides_order_captions_and_pixels(corpus, undisturbed):
    with Loader(corpus, with_options(seed=12)) as loader:
        assert read_step([loader]) != undisturbed[0]


def test_another_visit_draws_another_crop_and_may_draw_another_text(corpus):
    seen = {}
    with Loader(corpus, with_options(global_batch_size=NUM_RECORDS)) as loader:
        for _ in range(4):
            for key, text, _, pixels in seen_in(next(loader)):
                seen.setdefault(key, []).append((text, pixels))
    web = {key: views for key, views in seen.items() if key.startswith("web/")}
    assert all(len({pixels for _, pixels in views}) == 4 for views in web.values())
    assert {len({text for text, _ in views}) for views in web.values()} == {1, 2}


@pytest.mark.parametrize("num_kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_kills_and_resizes_leave_no_trace(corpus, undisturbed, tmp_path, num_kills):
    rng, num_steps = random.Random(num_kills), 40
    for number in range(num_kills + 1):
        command = [sys.executable, str(Path(__file__).with_name("loader_process.py"))]
        command += [corpus.root, str(tmp_path), str(num_steps)]
        command += ["--world", str(rng.choice((1, 2, 4))), "--workers", str(number % 2)]
        process = subprocess.Popen(command)
        if number < num_kills:
            log, before = tmp_path / "log", len(lines(tmp_path / "log"))
            until(lambda: len(lines(log)) > before or process.poll() is not None)  # noqa: B023
            time.sleep(rng.random() * 0.05)  # not a wait: any moment may be the last
            process.kill()
        process.wait()
    assert process.returncode == 0
    logged = [json.loads(line) for line in lines(tmp_path / "log")]
    assert {step for step, _ in logged} == set(range(num_steps))
    assert all(rows == undisturbed[step] for step, rows in logged)


def test_workers_end_with_a_training_process_that_is_killed(corpus, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("loader_process.py"))]
    command += [corpus.root, str(tmp_path), "1000000000", "--workers", "2"]
    with subprocess.Popen(command, start_new_session=True) as process:
        until(lambda: len(lines(tmp_path / "log")) > 2)
        assert len(session(process.pid)) >= 3
        process.kill()
    until(lambda: not session(process.pid))


def lines(path):
    if not path.exists():
        return []
    return path.read_text().splitlines(keepends=False) if path.read_text().endswith("\n") else []


def until(is_done, seconds=60):
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.01)


def session(leader):
    """Return the processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(entry.name))
    return found


# Sources


def test_weights_decide_the_sources_shares(corpus):
    shares = {"web": SourceConfig(weight=1), "coco": SourceConfig(weight=3)}
    with Loader(corpus, with_options(sources=shares, global_batch_size=20)) as loader:
        keys = keys_of(loader, 10)
    assert sum(key.startswith("coco/") for key in keys) == pytest.approx(150, abs=2)


def test_laion_comes_by_a_fifth_an_epoch_unless_told_otherwise(tmp_path):
    corpus = Corpus(str(tmp_path))
    write_web(corpus, "laion400m", (10, 10))
    with Loader(corpus, with_options(global_batch_size=4)) as loader:
        assert loader.steps_before(1) == 1
        assert len(set(keys_of(loader, 5))) == 20
    whole = {"laion400m": SourceConfig(fraction_per_epoch=1)}
    with Loader(corpus, with_options(sources=whole)) as loader:
        assert loader.steps_before(1) == 5


def test_only_the_sources_that_are_named_are_read(corpus):
    with Loader(corpus, with_options(sources={"coco": SourceConfig()})) as loader:
        assert {key.split("/")[0] for key in keys_of(loader, 5)} == {"coco"}


def test_images_that_are_held_out_are_never_trained_on(corpus):
    sides = {}
    for is_holdout in (False, True):
        config = with_options(holdout_fraction=0.4, is_holdout=is_holdout, global_batch_size=3)
        with Loader(corpus, config) as loader:
            sides[is_holdout] = {i for _ in range(30) for i in next(loader).image_ids.tolist()}
    assert sides[True]
    assert not sides[True] & sides[False]
    assert len(sides[True] | sides[False]) == 25


def test_the_same_bytes_have_one_image_id_in_every_source(tmp_path):
    corpus = Corpus(str(tmp_path))
    for source, make in (("web", web_item), ("coco", human_item)):
        write_clean(corpus, source, 0, [make(0, 0, photo(1)), make(0, 1, photo(source == "web"))])
    ids = {}
    with Loader(corpus, with_options(global_batch_size=12)) as loader:
        batch = next(loader)
        for key, image_id in zip(batch.keys, batch.image_ids.tolist(), strict=True):
            ids.setdefault(key, set()).add(image_id)
    assert ids["web/000000000"] == ids["coco/000000000"] == ids["web/000000001"]
    assert ids["coco/000000001"] != ids["coco/000000000"]
    assert all(len(each) == 1 and min(each) >= 0 for each in ids.values())


def test_dropped_captions_and_failed_rows_are_never_seen(corpus):
    with Loader(corpus, with_options(global_batch_size=NUM_RECORDS)) as loader:
        texts = {text for _ in range(20) for text in next(loader).texts}
    assert not [text for text in texts if "dropped" in text]
    assert len(texts) == 2 * 23 + 10


def write_raw(corpus, source, items):
    """Commit a raw shard as a download writes it, as far as training reads it."""
    fields = [pa.field(name, pa.string()) for name in ("sha256", "caption", "origin")]
    schema = ledger_schema([*fields, pa.field("num_captions", pa.int32())])
    with corpus.writer("raw", source, 0, fingerprint="raw") as writer:
        with (
            open(writer.path("tar"), "wb") as stream,
            TarWriter(stream) as tar,
            LedgerWriter(writer.path("parquet"), schema) as ledger,
        ):
            for item in items:
                captions = tuple(
                    Caption(text=text, origin=Origin(origin), index=number)
                    for number, (text, origin, _) in enumerate(item.captions)
                )
                tar.write(item.key, Sample(key=item.key, image=item.image, captions=captions)
                          .to_members())  # fmt: skip
                row = {"key": item.key, "source": source, "url": "", "verdict": "kept"}
                row |= {"reason": "", "sha256": hashlib.sha256(item.image).hexdigest()}
                row |= {"caption": captions[0].text, "origin": captions[0].origin.value}
                ledger.write(row | {"num_captions": len(captions)})
        writer.commit(rows_in=len(items), counts=ledger.counts)


def test_raw_shards_give_the_web_as_it_came_and_every_human_text(tmp_path):
    corpus = Corpus(str(tmp_path))
    web = [Item(f"00000000{n}", photo(n), ((f"Web text {n}", "web", True),)) for n in range(3)]
    write_raw(corpus, "web", web)
    write_raw(corpus, "coco", [human_item(0, 0, photo(9))])
    with Loader(corpus, with_options(stage="raw", global_batch_size=8)) as loader:
        for _ in range(3):
            batch = next(loader)
            human = {f"text {n} of 000000000" for n in range(5)}
            assert set(batch.texts) == {"web text 0", "web text 1", "web text 2"} | human
            assert len(set(batch.image_ids.tolist())) == 4


# Batches


def test_a_tokenizer_is_given_each_batchs_texts(corpus):
    def tokenize(texts):
        lengths = torch.tensor([len(text) for text in texts])[:, None]
        return lengths, lengths > 0

    with Loader(corpus, INLINE, tokenize=tokenize) as loader:
        batch = next(loader)
    assert batch.token_ids[:, 0].tolist() == [len(text) for text in batch.texts]
    assert batch.text_is_real.all()


def test_a_batch_is_normalised_on_request(corpus):
    with Loader(corpus, INLINE) as loader:
        batch = next(loader)
        values = loader.normalise(batch.pixels)
    assert batch.pixels.dtype == torch.uint8
    assert (values.shape, values.dtype) == ((4, 3, 16, 16), torch.float32)
    red = (batch.pixels[:, 0].float() / 255 - 0.48145466) / 0.26862954
    torch.testing.assert_close(values[:, 0], red)


def test_the_share_of_time_that_training_waits_is_known(corpus):
    with Loader(corpus, INLINE) as loader:
        next(loader)
        loader.take_timing()
        for _ in range(5):
            next(loader)
            time.sleep(0.02)  # stands for a training step
        timing = loader.take_timing()
        assert loader.take_timing().num_batches == 0
    assert timing.num_batches == 5
    assert 0 < timing.wait_share < 1
    assert timing.elapsed_seconds - timing.wait_seconds >= 0.1


# Faults


def damaged_corpus(root):
    """Return a corpus of one shard of eight, of which two images are broken and one text is."""
    corpus = Corpus(str(root))
    items = [web_item(0, row, photo(row)) for row in range(8)]
    items[2] = web_item(0, 2, photo(2)[:1200])
    items[3] = web_item(0, 3, b"no image at all")
    items[6] = Item(items[6].key, photo(6), (("!!!", "web", True),))
    write_clean(corpus, "web", 0, items)
    return corpus


def test_bad_samples_are_replaced_by_the_same_ones_each_time_and_counted(tmp_path, caplog):
    corpus = damaged_corpus(tmp_path)
    runs = []
    for num_workers in (0, 2):
        with Loader(corpus, with_options(num_workers=num_workers)) as loader:
            runs.append([seen_in(next(loader)) for _ in range(4)])
            assert loader.replaced == {
                "truncated_image": 2,
                "not_an_image": 4,  # twice itself, twice as what would have stood in for another
                "empty_caption": 2,
            }
    assert runs[0] == runs[1]
    epoch = Counter(key for step in runs[0][:2] for key, *_ in step)
    assert epoch == {f"web/00000000{n}": 1 for n in (0, 1, 5)} | {
        "web/000000004": 3,
        "web/000000007": 2,
    }
    assert "sample 000000003: neither image nor page" in caplog.text
    assert "sample 000000004 stands in for it" in caplog.text


def test_a_shard_without_a_single_sound_image_stops_training(tmp_path):
    corpus = Corpus(str(tmp_path))
    write_clean(corpus, "web", 0, [web_item(0, row, b"broken") for row in range(4)])
    with (
        Loader(corpus, INLINE) as loader,
        pytest.raises(LoaderError, match=r"shard clean/web/00000: 4 records in a row .*verify"),
    ):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_that_was_cut_stops_training_with_its_name(tmp_path, num_workers):
    corpus = demo_corpus(tmp_path)
    tar = tmp_path / "clean/web/00000.tar"
    os.truncate(tar, tar.stat().st_size - 512)
    with (
        Loader(corpus, with_options(num_workers=num_workers)) as loader,
        pytest.raises(LoaderError, match=r"step \d: .*clean/web/00000.tar has .* bytes, not"),
    ):
        keys_of(loader, 9)


def test_a_tar_that_is_gone_stops_training_with_its_name(tmp_path):
    corpus = demo_corpus(tmp_path)
    (tmp_path / "clean/web/00000.tar").unlink()
    with (
        Loader(corpus, INLINE) as loader,
        pytest.raises(LoaderError, match=r"clean/web/00000.tar is missing"),
    ):
        keys_of(loader, 9)


def test_a_worker_that_is_killed_stops_training_and_the_step_can_be_read_again(corpus, undisturbed):
    with Loader(corpus, with_options(num_workers=1)) as loader:
        assert read_step([loader]) == undisturbed[0]
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(LoaderError, match=r"step \d+: a worker process of the loader died"):
            keys_of(loader, 39)
        step = loader.step
        assert read_step([loader]) == undisturbed[step]


# Bad input: nothing starts


def refused(corpus, *, match, options=None, **position):
    with pytest.raises(LoaderError, match=match):
        Loader(corpus, with_options(**(options or {})), **position)


def test_a_corpus_without_clean_shards_is_refused(tmp_path):
    corpus = Corpus(str(tmp_path))
    refused(corpus, match="has no committed clean shard; run the selection")
    with corpus.writer("clean", "web", 0, fingerprint="f") as writer:  # begun, never committed
        Path(writer.path("tar")).write_bytes(b"half")
        refused(corpus, match="no committed clean shard; run the selection")


def test_fewer_samples_than_a_batch_are_refused(corpus):
    refused(
        corpus,
        options={"global_batch_size": 34},
        match="33 trainable records, fewer than one global batch of 34",
    )


def test_a_source_that_is_not_there_is_refused_by_name(corpus):
    refused(
        corpus,
        options={"sources": {"cc3m": SourceConfig()}},
        match="source cc3m has no clean shards, only coco, web has",
    )


def test_a_batch_that_ranks_cannot_share_equally_is_refused(corpus):
    refused(corpus, world_size=3, match="4 cannot be shared equally by 3 ranks")
    refused(corpus, world_size=2, micro_batches=4, match="make it a multiple of 8")


def test_a_ledger_without_the_columns_of_a_selection_is_refused(tmp_path):
    corpus = Corpus(str(tmp_path))
    items = [web_item(0, row, photo(row)) for row in range(4)]
    write_clean(corpus, "web", 0, items, leave_out=("image_bytes", "captions"))
    refused(
        corpus, match=r"clean/web/00000.parquet lacks image_bytes, captions.*Make the shard again"
    )


def test_a_damaged_ledger_is_refused_by_name(tmp_path):
    corpus = demo_corpus(tmp_path)
    ledger = tmp_path / "clean/web/00001.parquet"
    data = bytearray(ledger.read_bytes())
    data[-20:] = bytes(20)
    ledger.write_bytes(data)
    refused(corpus, match=r"clean/web/00001.parquet cannot be read .*capfilt verify")


def test_a_corpus_of_failures_only_has_nothing_to_train_on(tmp_path):
    corpus = Corpus(str(tmp_path))
    write_clean(corpus, "web", 0, [failed_item(0, row) for row in range(5)])
    refused(corpus, match="web have 0 trainable records")


def test_a_position_of_another_order_is_refused(corpus):
    with Loader(corpus, INLINE) as loader:
        state = loader.at(7).state_dict()
    assert all(type(value) is int for value in state.values())
    for options, told in (
        ({"seed": 12}, "seed 11 then, 12 now"),
        ({"global_batch_size": 8}, "global_batch_size 4 then, 8 now"),
        ({"group_shards": 3}, "group_shards 2 then, 3 now"),
        ({"sources": {"web": SourceConfig()}}, r"data \d+ then, \d+ now"),
    ):
        with (
            Loader(corpus, with_options(**options)) as loader,
            pytest.raises(LoaderError, match=told),
        ):
            loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sources": {"a": {"weight": 1}, "b": {}}}, r"sources \['b'\] have no weight"),
        ({"sources": {"a": {"weight": 1, "fraction_per_epoch": 1}}}, "exclude each other"),
        ({"is_holdout": True}, "is_holdout needs a holdout_fraction"),
        ({"std": (0.1, 0, 0.1)}, "must be positive"),
        ({"global_batch_sizes": 4}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        LoaderConfig.model_validate(options)


def test_what_decides_batches_holds_nothing_of_their_pace():
    assert CONFIG.content() == with_options(num_workers=7, prefetch_batches=5).content()
    assert CONFIG.content() != with_options(augmentation="crop").content()
