"""Checkpoints: whole or not there, strict, without pickles, the newest and the best kept."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.checkpoint import Checkpoints, fingerprint_tensors, optimizer_tensors, take_snapshot
from model.weight_files import CheckpointError
from pipeline.store import Store

FROZEN = {r"tower\..*": "frozen: known by its fingerprint"}
FOLDER = "train/med/checkpoints"


class Small(nn.Module):
    """Something with a frozen part, a buffer and a scalar."""

    def __init__(self, width=3):
        super().__init__()
        self.tower = nn.Linear(2, width).requires_grad_(False)
        self.head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.register_buffer("queue", torch.zeros(2, 4))

    def forward(self, x):
        return self.head(self.tower(x)) / self.temperature


def training(seed=0, width=3):
    torch.manual_seed(seed)
    model = Small(width)
    learns = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(learns, lr=0.1, fused=True)


def train(model, optimizer, num_steps):
    for number in range(num_steps):
        optimizer.zero_grad()
        model(torch.full((4, 2), number + 1.0)).square().mean().backward()
        optimizer.step()
        model.queue += 1


def fingerprint(model):
    return {"tower": fingerprint_tensors(model.tower.state_dict().items())}


def snapshot(model, optimizer, step, score=None):
    return take_snapshot(
        model,
        optimizer,
        FROZEN,
        step=step,
        content={"lr": 0.1},
        frozen=fingerprint(model),
        state={"loader": {"step": step}},
        score=score,
    )


def save(store, model, optimizer, step, score=None, keep=2):
    with Checkpoints(store, FOLDER, keep=keep) as checkpoints:
        checkpoints.save(snapshot(model, optimizer, step, score))


def load(store, model, optimizer):
    checkpoints = Checkpoints(store, FOLDER)
    manifest = checkpoints.latest()
    checkpoints.load(manifest, model, optimizer, fingerprint(model), FROZEN)
    return manifest


def everything(model, optimizer):
    return model.state_dict() | optimizer_tensors(model, optimizer)


@pytest.fixture(params=["disk", "object storage"])
def store(request, tmp_path):
    if request.param == "disk":
        return Store(str(tmp_path))
    return Store(f"memory://{tmp_path.name}/corpus")


@pytest.fixture
def disk(tmp_path):
    return Store(str(tmp_path))


def steps(store):
    return [manifest.step for manifest in Checkpoints(store, FOLDER).list()]


def test_training_goes_on_from_a_checkpoint_to_the_bit(store):
    model, optimizer = training()
    train(model, optimizer, 3)
    save(store, model, optimizer, 3)
    train(model, optimizer, 2)
    other, its_optimizer = training(seed=0)
    manifest = load(store, other, its_optimizer)
    assert manifest.step == 3
    assert manifest.state == {"loader": {"step": 3}}
    train(other, its_optimizer, 2)
    ours, theirs = everything(other, its_optimizer), everything(model, optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_before_the_first_step_can_be_loaded(disk):
    model, optimizer = training()
    save(disk, model, optimizer, 0)
    other, its_optimizer = training()
    assert load(disk, other, its_optimizer).step == 0


def test_what_is_saved_is_the_moment_of_saving(disk):
    model, optimizer = training()
    train(model, optimizer, 1)
    with Checkpoints(disk, FOLDER) as checkpoints:
        taken = snapshot(model, optimizer, 1)
        before = model.head.weight.detach().clone()
        train(model, optimizer, 1)
        checkpoints.save(taken)
    other, its_optimizer = training()
    load(disk, other, its_optimizer)
    assert torch.equal(other.head.weight, before)


def test_it_exists_once_its_manifest_does(disk, tmp_path):
    model, optimizer = training()
    save(disk, model, optimizer, 1)
    save(disk, model, optimizer, 2)
    (tmp_path / FOLDER / "00000002" / "manifest.json").unlink()
    assert steps(disk) == [1]
    assert Checkpoints(disk, FOLDER).latest().step == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_a_damaged_one_is_passed_over_for_the_one_before(disk, tmp_path, caplog, damage):
    model, optimizer = training()
    train(model, optimizer, 1)
    save(disk, model, optimizer, 1)
    save(disk, model, optimizer, 2)
    path = next((tmp_path / FOLDER / "00000002").glob("model.*"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "missing":
        path.unlink()
    else:
        path.with_name("manifest.json").write_text("{")
    assert Checkpoints(disk, FOLDER).latest().step == 1
    assert "00000002 is passed over" in caplog.text


def test_what_comes_after_the_step_that_is_resumed_is_cleared_away(disk, tmp_path):
    model, optimizer = training()
    save(disk, model, optimizer, 1)
    save(disk, model, optimizer, 2)
    (tmp_path / FOLDER / ".00003.abc").mkdir()
    Checkpoints(disk, FOLDER).discard_after(1)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00000001"]


def test_the_newest_and_the_best_are_kept(store):
    model, optimizer = training()
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.4), (4, None), (5, 0.1)):
        save(store, model, optimizer, step, score, keep=2)
    assert steps(store) == [2, 4, 5]


def test_frozen_parts_are_not_stored_but_known(disk, tmp_path):
    model, optimizer = training()
    train(model, optimizer, 1)
    save(disk, model, optimizer, 1)
    manifest = json.loads((tmp_path / FOLDER / "00000001" / "manifest.json").read_text())
    assert manifest["frozen"] == fingerprint(model)
    path = next((tmp_path / FOLDER / "00000001").glob("model.*"))
    from safetensors.torch import load_file

    assert sorted(load_file(path)) == ["head.bias", "head.weight", "queue", "temperature"]
    with torch.no_grad():
        model.tower.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="frozen tower of fingerprint"):
        load(disk, model, optimizer)


def test_another_architecture_is_refused_by_name(disk):
    model, optimizer = training()
    train(model, optimizer, 1)
    save(disk, model, optimizer, 1)
    wide, its_optimizer = training(width=5)
    before = wide.head.weight.detach().clone()
    checkpoints = Checkpoints(disk, FOLDER)
    with pytest.raises(CheckpointError, match=r"head.weight is \(2, 3\), the model has \(2, 5\)"):
        checkpoints.load(checkpoints.latest(), wide, its_optimizer, fingerprint(model), FROZEN)
    assert torch.equal(wide.head.weight, before)


def test_an_optimizer_of_other_parameters_is_refused(disk):
    model, optimizer = training()
    train(model, optimizer, 1)
    save(disk, model, optimizer, 1)
    fewer = torch.optim.AdamW([model.head.weight], lr=0.1)
    with pytest.raises(CheckpointError, match="optimizer and model differ in 2: head.bias"):
        load(disk, model, fewer)


def test_nothing_in_it_is_a_pickle(disk, tmp_path):
    model, optimizer = training()
    train(model, optimizer, 1)
    save(disk, model, optimizer, 1)
    files = [path for path in (tmp_path / FOLDER).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in files)


def test_two_writers_of_one_step_leave_one_whole_checkpoint(disk):
    model, optimizer = training()
    train(model, optimizer, 1)
    first, second = Checkpoints(disk, FOLDER), Checkpoints(disk, FOLDER)
    with first, second:
        first.save(snapshot(model, optimizer, 1))
        train(model, optimizer, 1)
        second.save(snapshot(model, optimizer, 1))
    assert Checkpoints(disk, FOLDER).latest().step == 1


def test_what_the_writer_meets_is_raised_where_it_is_waited_for(disk, tmp_path):
    model, optimizer = training()
    Path(tmp_path / "train/med").mkdir(parents=True)
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    checkpoints = Checkpoints(disk, FOLDER)
    checkpoints.save(snapshot(model, optimizer, 1))
    with pytest.raises(OSError, match="checkpoints"):
        checkpoints.wait()
