"""The parts of training: the paper's numbers, alarms, texts, probes, logs."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import BertTokenizer

from jobs.errors import UserError
from jobs.evaluation.captions import caption_quality
from jobs.training.config import (
    STAGES,
    StageConfig,
    TrainingConfig,
    WatchConfig,
    WorkersConfig,
)
from jobs.training.context import TrainContext
from jobs.training.gates import ITM_PRIOR, PATIENCE, DivergedError, Expectations, FiniteGuard, Gates
from jobs.training.logs import MetricsLog, open_sinks, read_metrics
from jobs.training.objectives import Batch, Look
from jobs.training.pace import Pace
from jobs.training.plan import plan_stage
from jobs.training.probes import probe, retrieval_at_1, score_of
from jobs.training.step import Window
from jobs.training.texts import (
    TextTokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_vocabulary,
    vocabulary_of_words,
)
from model.optim import DecayRule, EpochCosine, EpochStep, WarmupCosine
from pipeline.loader import LoaderTiming
from pipeline.store import Store

CPU = torch.device("cpu")


# --- the paper's numbers ------------------------------------------------------------------------


def planned(stage, num_pairs=1_000_000, **options):
    section = TrainingConfig.model_validate({stage: options}).of(stage)
    return plan_stage(stage, section, num_pairs)


def test_med_is_planned_as_blip_was_trained():
    plan = planned("med", num_pairs=14_000_000)
    assert plan.global_batch_size == 2880
    assert plan.num_steps == 20 * (14_000_000 // 2880)
    assert isinstance(plan.schedule, EpochStep)
    assert plan.schedule(3000) == pytest.approx(3e-4)
    assert (plan.adamw.betas, plan.adamw.rule) == ((0.9, 0.999), DecayRule.ALL)
    assert plan.alpha_ramp_steps == 2 * (14_000_000 // 2880)


@pytest.mark.parametrize(
    ("stage", "preset", "epochs", "rate"),
    [
        ("captioner", "base", 5, 1e-5),
        ("captioner", "large", 5, 2e-6),
        ("filter", "base", 6, 1e-5),
        ("filter", "large", 6, 5e-6),
    ],
)
def test_fine_tuning_is_planned_as_blip_was_fine_tuned(stage, preset, epochs, rate):
    plan = planned(stage, num_pairs=566_747, preset=preset)
    steps_per_epoch = 566_747 // 256
    assert (plan.global_batch_size, plan.num_steps) == (256, epochs * steps_per_epoch)
    assert isinstance(plan.schedule, EpochCosine)
    assert plan.schedule(0) == plan.schedule(steps_per_epoch - 1) == pytest.approx(rate)
    half = 0.5 * rate * (1 + math.cos(math.pi / epochs))
    assert plan.schedule(steps_per_epoch) == pytest.approx(half)


@pytest.mark.parametrize(
    ("stage", "preset", "batch", "steps", "floor"),
    [
        ("stage1", "blip2-opt-2.7b", 1680, 250_000, 1e-5),
        ("stage1", "blip2-vit-l-opt-2.7b", 2320, 250_000, 1e-5),
        ("stage2", "blip2-opt-2.7b", 1920, 80_000, 5e-5),
        ("stage2", "blip2-flan-t5-xl", 1520, 80_000, 5e-5),
    ],
)
def test_both_stages_are_planned_as_blip2_was_trained(stage, preset, batch, steps, floor):
    plan = planned(stage, preset=preset)
    assert (plan.global_batch_size, plan.num_steps) == (batch, steps)
    assert isinstance(plan.schedule, WarmupCosine)
    assert plan.schedule(0) == pytest.approx(1e-6)
    assert plan.schedule(2000) == pytest.approx(1e-4)
    assert plan.schedule(steps) == pytest.approx(floor)
    assert (plan.adamw.betas, plan.adamw.weight_decay) == ((0.9, 0.98), 0.05)


def test_without_a_preset_med_and_stage1_start_from_bert_and_with_one_from_nothing():
    papers = TrainingConfig()
    assert (papers.of("med").preset, papers.of("stage1").preset) == ("base", "blip2-opt-2.7b")
    assert papers.of("med").text_model == papers.of("stage1").text_model == "bert-base-uncased"
    assert papers.of("stage2").text_model is None
    tiny = TrainingConfig.model_validate({"med": {"preset": "tiny"}})
    assert tiny.of("med").text_model is None


def test_what_a_recipe_says_is_taken_over_the_papers():
    plan = planned("stage1", num_steps=500, global_batch_size=32, peak_rate=2e-3, beta2=0.99)
    assert (plan.global_batch_size, plan.num_steps, plan.adamw.betas[1]) == (32, 500, 0.99)
    assert plan.schedule(50) == pytest.approx(2e-3)  # a tenth of so short a training warms up


def test_an_unknown_preset_and_too_little_data_say_what_to_do():
    with pytest.raises(UserError, match="training.med.preset = 'huge': none of tiny"):
        planned("med", preset="huge")
    with pytest.raises(UserError, match="500 pairs, fewer than one global batch of 2,880"):
        planned("med", num_pairs=500)


def test_pace_is_no_part_of_what_decides_the_weights():
    one = TrainingConfig.model_validate({"stage1": {"micro_batch_size": 4}})
    other = TrainingConfig.model_validate(
        {"workers": {"num_workers": 8}, "num_loader_workers": 9, "watch": {"log_every_steps": 7}}
    )
    for stage in STAGES:
        assert one.stage_content(stage) == other.stage_content(stage)
    slower = TrainingConfig.model_validate({"stage1": {"peak_rate": 1e-5}})
    assert slower.stage_content("stage1") != one.stage_content("stage1")
    assert slower.stage_content("stage2") == one.stage_content("stage2")


@pytest.mark.parametrize("key", ["start_from", "text_model", "image_encoder", "llm"])
def test_where_weights_lie_is_no_part_of_it_but_what_they_are_called_is(key):
    """What is in them has a fingerprint; another machine may have them elsewhere."""

    def content(name):
        return TrainingConfig.model_validate({"stage2": {key: name}}).stage_content("stage2")

    assert content("/mnt/a/eva.pth") == content("/scratch/b/eva.pth") == content("./eva.pth")
    assert content("/mnt/a/eva.pth")[key] == "eva.pth"
    assert content("s3://bucket/x/opt/") == content("/mnt/opt")
    assert content("facebook/opt-2.7b")[key] == "facebook/opt-2.7b"
    tokenizers = [TrainingConfig(tokenizer=name) for name in ("/a/bert", "/b/bert", "org/bert")]
    one, moved, other = (each.stage_content("stage1") for each in tokenizers)
    assert one == moved != other


def test_settings_are_checked_where_they_are_made():
    with pytest.raises(ValidationError, match="min_workers 4 is above num_workers"):
        WorkersConfig(num_workers=2, min_workers=4)
    with pytest.raises(ValidationError, match="Extra inputs"):
        StageConfig.model_validate({"learning_rate": 1})
    assert list(WorkersConfig(num_workers=3, min_workers=2).possible) == [2, 3]


# --- alarms -------------------------------------------------------------------------------------

HEALTHY = {"itc": 1.0, "itm": 0.3, "temperature": 0.05, "lm_seen": 2.0, "lm_blind": 3.0}
EXPECTED = Expectations(num_contrasted=64, temperature_range=(0.001, 0.5), after_steps=100)


@pytest.mark.parametrize(
    ("name", "sick"),
    [
        ("itm_at_prior", {"itm": 0.637}),
        ("itc_at_chance", {"itc": math.log(64)}),
        ("temperature_at_limit", {"temperature": 0.001}),
        ("temperature_at_limit", {"temperature": 0.5}),
        ("lm_blind", {"lm_seen": 3.0}),
        ("lm_blind", {"lm_blank": 2.0}),
        ("same_caption", {"num_distinct_captions": 1.0}),
    ],
)
def test_what_does_not_get_better_becomes_an_alarm_with_advice(name, sick):
    gates = Gates(EXPECTED)
    for _ in range(PATIENCE - 1):
        assert gates.judge(200, HEALTHY | sick) == []
    alarms = gates.judge(200, HEALTHY | sick)
    assert [alarm.name for alarm in alarms] == [name]
    assert len(alarms[0].advice) > 40
    assert gates.judge(200, HEALTHY) == []


def test_healthy_training_and_its_beginning_raise_no_alarm():
    gates = Gates(EXPECTED)
    assert [gates.judge(200, HEALTHY) for _ in range(5)] == [[]] * 5
    early = {"itm": ITM_PRIOR, "itc": math.log(64)}
    assert [gates.judge(99, early) for _ in range(5)] == [[]] * 5


def test_the_prior_of_matching_is_the_known_number():
    assert pytest.approx(0.6365, abs=1e-4) == ITM_PRIOR


def test_a_loss_that_is_not_finite_is_told_with_its_first_step():
    guard = FiniteGuard(CPU)
    guard.see(6, torch.tensor(1.0), torch.tensor(2.0))
    guard.check()
    guard.see(7, torch.tensor(1.0), torch.tensor(torch.inf))
    guard.see(8, torch.tensor(torch.nan), torch.tensor(1.0))
    with pytest.raises(DivergedError, match="not finite since step 7.*Lower peak_rate"):
        guard.check()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=9), st.data())
def test_a_window_that_is_saved_and_restored_ends_at_the_same_number(values, data):
    cut = data.draw(st.integers(0, len(values)))
    whole, first, second = (Window(TrainContext(CPU)) for _ in range(3))
    for value in values:
        whole.add({"loss": torch.tensor(value)})
    for value in values[:cut]:
        first.add({"loss": torch.tensor(value)})
    second.restore(json.loads(json.dumps(first.state())))
    for value in values[cut:]:
        second.add({"loss": torch.tensor(value)})
    assert second.means() == whole.means()


# --- texts --------------------------------------------------------------------------------------


def vocabulary(*captions, size=256):
    return vocabulary_of_words(captions, size)


def of_words(*captions):
    return tokenizer_from_vocabulary(json.dumps(vocabulary(*captions)).encode())


def test_a_tokenizer_of_the_corpus_knows_its_words_and_spells_others():
    tokenizer = of_words("A red circle.", "a blue square, don't!")
    ids, is_real = tokenizer.encode(["a red circle", "a zebra"], 10)
    assert ids.shape == is_real.shape == (2, 10)
    assert is_real.sum(dim=1).tolist() == [5, 8]  # [CLS] a red circle [SEP]; z e b r a
    assert int(ids.max()) < tokenizer.num_plain
    assert tokenizer.decode(ids, num_prompt=1) == ["a red circle", "a zebra"]
    assert len(tokenizer.prompt_ids("a picture of")) == 4


def test_the_vocabulary_depends_on_counts_and_not_on_order():
    assert vocabulary("b a", "a c") == vocabulary("c a", "a b")
    short = vocabulary("rare", "often often", size=256)
    assert short.index("often") < short.index("rare")
    assert len(vocabulary(*(f"word{n}x" for n in range(999)), size=300)) == 300


def test_a_saved_tokenizer_is_the_same_for_us_and_for_transformers(tmp_path):
    tokenizer = of_words("a red circle")
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.tokenizer.get_vocab() == tokenizer.tokenizer.get_vocab()
    assert again.num_plain == tokenizer.num_plain
    theirs = BertTokenizer.from_pretrained(tmp_path)
    assert (
        theirs("a red circle")["input_ids"] == tokenizer.encode(["a red circle"], 5)[0][0].tolist()
    )


def test_dec_and_enc_come_right_behind_all_other_tokens():
    tokenizer = of_words("a red circle")
    found = tokenizer.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    assert found == [tokenizer.num_plain, tokenizer.num_plain + 1]


def test_a_tokenizer_without_a_special_token_is_refused_by_name():
    lacking = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "a": 2}, sep_token=None)
    lacking.sep_token = None
    with pytest.raises(UserError, match=r"tokenizer lacking: it has no \[SEP\]"):
        TextTokenizer.of(lacking, "lacking")


def test_a_tokenizer_that_is_nowhere_is_told(tmp_path):
    with pytest.raises(UserError, match="can neither be found on this machine nor downloaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


# --- probes, logs, pace -------------------------------------------------------------------------


def test_probes_measure_what_their_names_say():
    feats = torch.eye(4)
    ids = torch.arange(4)
    assert retrieval_at_1(feats, feats, ids) == 1.0
    assert retrieval_at_1(feats, feats.roll(1, 0), ids) == 0.0
    assert retrieval_at_1(feats, feats.roll(1, 0), torch.zeros(4)) == 1.0  # one image throughout
    queries = torch.stack((torch.zeros(4, 4), feats), dim=1)
    assert retrieval_at_1(queries, feats, ids) == 1.0


class Captioning:
    """An objective that says what it is told of each image."""

    def __init__(self, says):
        self.model, self.says = torch.nn.Identity(), says

    def look(self, batch):
        return Look(captions=[self.says[number] for number in batch.image_ids.tolist()])


def test_captions_are_probed_by_the_same_cider_as_evaluation():
    texts = {1: ["A red star.", "a star"], 2: ["a green heart"], 3: ["two blue squares"]}
    rows = [(1, texts[1][0]), (2, texts[2][0]), (3, texts[3][0]), (1, texts[1][1])]
    says = {1: "a red star", 2: "a heart", 3: ""}
    batches = [
        Batch(torch.zeros(2, 3, 2, 2), torch.tensor(ids), None, said)
        for ids, said in (zip(*rows[start : start + 2], strict=True) for start in (0, 2))
    ]
    found = probe(Captioning(says), batches)
    wanted = caption_quality(list(says.values()), list(texts.values())).figures["CIDEr"]
    assert found == {"cider": wanted, "num_distinct_captions": 3.0}
    assert 0 < wanted < 10
    assert score_of(found) == wanted / 10


@pytest.fixture(params=["disk", "object storage"])
def store(request, tmp_path):
    if request.param == "disk":
        return Store(str(tmp_path))
    return Store(f"memory://{tmp_path.name}/corpus")


def test_a_resumed_log_forgets_the_steps_that_are_done_again(store):
    with MetricsLog(store, "train/med", resumed_at=0, sinks=[]) as log:
        for step in (2, 4, 6):
            log.write({"step": step, "loss": step / 2})
    with MetricsLog(store, "train/med", resumed_at=4, sinks=[]) as log:
        log.write({"step": 6, "loss": 9.0})
    rows = read_metrics(store, "train/med")
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 1.0), (4, 2.0), (6, 9.0)]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    (tmp_path / "train/med").mkdir(parents=True)
    (tmp_path / "train/med/metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(Store(str(tmp_path)), "train/med") == [{"step": 1}]


def test_sinks_get_every_number_by_its_path(tmp_path):
    class Kept:
        def __init__(self):
            self.rows = []

        def write(self, step, numbers):
            self.rows.append((step, numbers))

        def close(self):
            self.rows.append("closed")

    sink = Kept()
    with MetricsLog(Store(str(tmp_path)), "train/med", resumed_at=0, sinks=[sink]) as log:
        log.write({"step": 3, "loss": 1, "alarms": {"x": "advice"}, "pace": {"mfu": 0.4}})
    assert sink.rows == [(3, {"loss": 1.0, "pace/mfu": 0.4}), "closed"]


def test_pace_is_of_all_workers_and_mfu_of_one():
    pace = Pace(CPU, global_batch_size=32, batches_per_step=2, peak_tflops=10.0, step_tflops=4.0)
    numbers = pace.numbers(LoaderTiming(num_batches=8, wait_seconds=1.0, elapsed_seconds=4.0))
    assert numbers["images_per_second"] == 32
    assert numbers["data_wait_share"] == 0.25
    assert numbers["mfu"] == pytest.approx(0.4)
    assert numbers["memory_gib"] > 0


def test_tensorboard_files_stand_beside_the_records(tmp_path):
    store = Store(str(tmp_path))
    sinks = open_sinks(store, "train/med", WatchConfig(), "test")
    with MetricsLog(store, "train/med", resumed_at=0, sinks=sinks) as log:
        log.write({"step": 1, "loss": 0.5})
    assert list((tmp_path / "train/med/tensorboard").glob("events.out.tfevents.*"))


def test_object_storage_has_no_tensorboard_files(tmp_path):
    assert open_sinks(Store(f"memory://{tmp_path.name}"), "train/med", WatchConfig(), "test") == []
