"""Training by torch.compile: the same losses as without, from the same checkpoints."""

import shutil

import pytest
from safetensors.torch import load_file
from training_jobs import alone, job, records, write_corpus

from jobs.checkpoint import Checkpoints

pytestmark = [
    pytest.mark.slow,  # a compiler builds every stage, for minutes on two cores
    pytest.mark.timeout(1500),
]
NUM_STEPS, STOPPED_AFTER = 6, 2
# Dropout is drawn by the compiled code itself, and otherwise; nothing else is.
EXACT = {"dropout": 0.0, "has_llm_dropout": False, "num_steps": NUM_STEPS, "peak_rate": 1e-4}
WATCH = {"log_every_steps": 1}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A root in which there is what every stage begins from."""
    root = tmp_path_factory.mktemp("begun") / "corpus"
    write_corpus(root)
    for stage in ("med", "stage1"):
        alone(job(root, stage))
    return root


def trained(begun, folder, stage, **options):
    """Train a stage anew, stopped once, the rest as `options` say; return its job."""
    shutil.copytree(begun, folder)
    shutil.rmtree(folder / "train" / stage, ignore_errors=True)
    answers = iter([False] * (STOPPED_AFTER - 1) + [True])
    assert alone(job(folder, stage, EXACT, watch=WATCH), lambda: next(answers)) is None
    this = job(folder, stage, EXACT, watch=WATCH, **options)
    assert alone(this) is not None
    return this


def last_weights(this):
    checkpoints = Checkpoints(this.open_store(), f"{this.folder}/checkpoints")
    last = checkpoints.latest()
    assert last.step == NUM_STEPS
    return load_file(f"{checkpoints.path(last.step)}/{last.files['model'].name}")


@pytest.mark.parametrize("stage", ["captioner", "stage2", "filter", "stage1", "med"])
def test_compiled_it_goes_on_from_an_eager_checkpoint_with_the_same_losses(stage, begun, tmp_path):
    eager = trained(begun, tmp_path / "eager", stage)
    compiled = trained(begun, tmp_path / "compiled", stage, is_compiled=True)
    assert last_weights(compiled).keys() == last_weights(eager).keys()
    assert not any("_orig_mod" in name for name in last_weights(compiled))
    ours, theirs = records(compiled), records(eager)
    assert [row["step"] for row in ours] == list(range(1, NUM_STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        names = {"loss", "itc", "itm", "lm", "itg"} & other.keys()
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, abs=1e-4)
