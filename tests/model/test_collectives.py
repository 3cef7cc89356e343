"""Two real gloo processes against one process that holds the joined batch."""

import dataclasses
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stage1_golden import CONFIG, A, batch, npz, reference_model
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from model import collectives
from model.losses import Negatives
from model.stage1 import Stage1

HERE = Path(__file__)
WORLD = 2
EXACT = {"atol": 1e-10, "rtol": 1e-9}  # in float64


def run_two(tasks, folder):
    """Run tasks of this file in two processes; return by task what each rank saved."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    commands = [
        [sys.executable, str(HERE), str(rank), str(folder), *tasks] for rank in range(WORLD)
    ]
    running = [
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for rank, process in enumerate(running):
        assert process.returncode == 0, f"rank {rank}:\n{errors[rank]}"
    saved = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    return {task: [saved[rank][task] for rank in range(WORLD)] for task in tasks}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What every task left behind; one start of two processes serves all tests."""
    tasks = ["train", "sample", "exchange", "data_parallel", "uneven"]
    return run_two(tasks, tmp_path_factory.mktemp("two"))


def joined():
    """Six pairs, two of one image: three for each rank."""
    arrays = npz(A / "data.npz")
    return batch(arrays, torch.tensor([4, -1, 9, 9, -1, 4]))


# Every rank draws across ranks, repeats itself and takes own rows; no pair of equal id.
NEGATIVES = Negatives(torch.tensor([1, 4, 4, 0, 1, 2]), torch.tensor([4, 0, 5, 1, 0, 1]))


def model_of(*, gather_grad):
    return reference_model(dataclasses.replace(CONFIG, gather_grad=gather_grad), torch.float64)


def inputs_of(rows):
    image, ids, is_real, image_ids = (values[rows] for values in joined())
    return image.double(), ids, is_real, image_ids


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def average(ranks):
    """What data-parallel training makes of the ranks' values."""
    return {name: (ranks[0][name] + ranks[1][name]) / 2 for name in ranks[0]}


def task_train(rank):
    """One step of each loss for either gather semantics; returns losses and gradients."""
    rows = slice(3 * rank, 3 * rank + 3)
    own = Negatives(NEGATIVES.image_for_text[rows], NEGATIVES.text_for_image[rows])
    saved = {}
    for gather_grad in (False, True):
        for loss in ("itc", "itm", "itg"):
            model = model_of(gather_grad=gather_grad)
            losses = model(*inputs_of(rows), own)
            getattr(losses, loss).backward()
            kind = f"{loss}.{gather_grad}"
            saved[f"loss.{kind}"] = getattr(losses, loss).detach()
            saved |= {f"grad.{kind}.{name}": grad for name, grad in grads_of(model).items()}
    saved["sim_i2t"], saved["sim_t2i"] = losses.sim_i2t.detach(), losses.sim_t2i.detach()
    saved["itm_logits"] = losses.itm_logits.detach()
    return saved


@pytest.fixture(scope="module")
def ranks(two):
    return two["train"]


@pytest.fixture(scope="module")
def whole():
    return model_of(gather_grad=True)(*inputs_of(slice(None)), NEGATIVES)


def joined_grads(loss, *, gather_grad):
    model = model_of(gather_grad=gather_grad)
    losses = model(*inputs_of(slice(None)), NEGATIVES)
    getattr(losses, loss).backward()
    return grads_of(model)


@pytest.mark.parametrize("loss", ["itc", "itm"])
@pytest.mark.parametrize("gather_grad", [False, True])
def test_09_mean_loss_of_two_ranks_is_that_of_the_joined_batch(ranks, whole, loss, gather_grad):
    mean = average(ranks)[f"loss.{loss}.{gather_grad}"]
    assert_close(mean, getattr(whole, loss).detach(), **EXACT)


def test_09_two_ranks_see_the_similarities_of_the_joined_batch(ranks, whole):
    for name in ("sim_i2t", "sim_t2i"):
        both = torch.cat([ranks[0][name], ranks[1][name]])
        assert_close(both, getattr(whole, name).detach(), **EXACT)


def test_matching_logits_of_two_ranks_are_those_of_the_joined_batch(ranks, whole):
    parts = [rank["itm_logits"].view(3, 3, 2) for rank in ranks]  # kind, pair, class
    assert_close(torch.cat(parts, dim=1).flatten(0, 1), whole.itm_logits.detach(), **EXACT)


@pytest.mark.parametrize("loss", ["itc", "itm"])
@pytest.mark.parametrize("gather_grad", [False, True])
def test_09_averaged_gradients_are_those_of_the_joined_batch(ranks, loss, gather_grad):
    prefix = f"grad.{loss}.{gather_grad}."
    mean = {
        name.removeprefix(prefix): grad
        for name, grad in average(ranks).items()
        if name.startswith(prefix)
    }
    expected = joined_grads(loss, gather_grad=gather_grad)
    assert mean.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(mean[name], grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert expected["ln_vision.weight"].norm() > 1e-3


def test_captioning_stays_on_its_rank(ranks):
    for rank in range(WORLD):
        alone = model_of(gather_grad=False)(*inputs_of(slice(3 * rank, 3 * rank + 3))).itg
        assert_close(ranks[rank]["loss.itg.False"], alone.detach(), **EXACT)


def task_sample(rank):
    """Negatives drawn on each rank, many times; returns them as global numbers."""
    torch.manual_seed(rank)
    rows = slice(3 * rank, 3 * rank + 3)
    model = model_of(gather_grad=False)
    with torch.no_grad():
        drawn = [model(*inputs_of(rows)).negatives for _ in range(30)]
    return {
        "images": torch.stack([negatives.image_for_text for negatives in drawn]),
        "texts": torch.stack([negatives.text_for_image for negatives in drawn]),
    }


def test_negatives_come_from_all_ranks_and_never_show_the_same_image(two):
    drawn = two["sample"]
    for kind in ("images", "texts"):
        both = torch.cat([drawn[0][kind], drawn[1][kind]], dim=1)  # (draws, N)
        pairs = {(row, column) for draw in both.tolist() for row, column in enumerate(draw)}
        assert not pairs & ({(i, i) for i in range(6)} | {(0, 5), (5, 0), (2, 3), (3, 2)})
        assert any(column >= 3 for row, column in pairs if row < 3)
        assert any(column < 3 for row, column in pairs if row >= 3)


def task_exchange(rank):
    """Rows by global number, with the gradient that comes back to each owner."""
    rows = (torch.arange(3.0) + 10 * rank)[:, None].requires_grad_()
    wanted = torch.tensor([[5, 0, 0, 4], [3, 0, 5, 5]][rank])
    got = collectives.exchange_rows(rows, wanted)
    (got[:, 0] * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    half = collectives.exchange_rows(rows.detach().bfloat16(), wanted)
    own_only = collectives.exchange_rows(rows.detach(), torch.tensor([0, 2, 1]) + 3 * rank)
    return {
        "got": got.detach(),
        "grad": rows.grad,
        "half": half,
        "own_only": own_only,
        "gathered": collectives.gather(rows),
        "keeps_grad": torch.tensor(collectives.gather(rows).requires_grad),
    }


def test_d9_exchange_moves_the_wanted_rows_and_returns_their_gradient(two):
    saved = two["exchange"]
    assert saved[0]["got"].flatten().tolist() == [12, 0, 0, 11]
    assert saved[1]["got"].flatten().tolist() == [10, 0, 12, 12]
    assert saved[0]["grad"].flatten().tolist() == [110 + 10, 0, 0]
    assert saved[1]["grad"].flatten().tolist() == [1, 1000, 1 + 100 + 1000]
    assert saved[0]["half"].dtype == torch.bfloat16  # what autocast sends
    assert saved[0]["half"].flatten().tolist() == [12, 0, 0, 11]
    assert saved[0]["own_only"].flatten().tolist() == [0, 2, 1]
    assert saved[1]["own_only"].flatten().tolist() == [10, 12, 11]
    for rank in range(WORLD):
        assert saved[rank]["gathered"].flatten().tolist() == [0, 1, 2, 10, 11, 12]
        assert not saved[rank]["keeps_grad"]


def task_data_parallel(rank):
    """Gradients of the whole loss: each rank's own, and what DistributedDataParallel makes."""
    rows = slice(3 * rank, 3 * rank + 3)
    own = Negatives(NEGATIVES.image_for_text[rows], NEGATIVES.text_for_image[rows])
    alone, wrapped = model_of(gather_grad=True), DistributedDataParallel(model_of(gather_grad=True))
    for model in (alone, wrapped):
        model(*inputs_of(rows), own).total.backward()
    averaged = {f"averaged.{name}": grad for name, grad in grads_of(wrapped.module).items()}
    return averaged | {f"alone.{name}": grad for name, grad in grads_of(alone).items()}


def test_data_parallel_training_averages_every_gradient(two):
    saved = two["data_parallel"]
    mean = average(saved)
    names = {name.removeprefix("alone.") for name in mean if name.startswith("alone.")}
    assert names == {name for name, _ in model_of(gather_grad=True).named_parameters()}
    for name in names:
        assert_close(saved[0][f"averaged.{name}"], mean[f"alone.{name}"], **EXACT)


def task_compiled(rank):
    """One step with and without torch.compile, which leaves the exchanges out of its graphs."""
    rows = slice(3 * rank, 3 * rank + 3)
    own = Negatives(NEGATIVES.image_for_text[rows], NEGATIVES.text_for_image[rows])
    torch.manual_seed(0)
    sizes = dataclasses.replace(CONFIG.qformer, num_layers=1)
    config = dataclasses.replace(CONFIG, qformer=sizes, gather_grad=True)
    model = Stage1(config, torch.nn.Identity()).double()
    saved = {}
    for name, run in {
        "eager": model,
        "compiled": torch.compile(model, backend="aot_eager"),
    }.items():
        model.zero_grad()
        run(*inputs_of(rows), own).total.backward()
        saved |= {f"{name}.{n}": grad.clone() for n, grad in grads_of(model).items()}
    return saved


@pytest.mark.slow
def test_two_ranks_compile(tmp_path):
    for saved in run_two(["compiled"], tmp_path)["compiled"]:
        names = [name for name in saved if name.startswith("eager.")]
        assert names
        for name in names:
            assert_close(saved[name.replace("eager", "compiled")], saved[name], **EXACT)


def task_uneven(rank):
    """The message each rank stops with when batch or text sizes differ."""
    image, ids, is_real, image_ids = inputs_of(slice(0, 3 - rank))
    model = model_of(gather_grad=False)
    messages = {}
    for name, length in {"batch": ids.shape[1], "text": ids.shape[1] - 3 * rank}.items():
        size = len(ids) if name == "batch" else 2
        try:
            model(image[:size], ids[:size, :length], is_real[:size, :length], image_ids[:size])
        except ValueError as error:
            messages[name] = torch.tensor(list(str(error).encode()))
    return messages


def test_d5_uneven_ranks_raise_on_every_rank_instead_of_hanging(two):
    for saved in two["uneven"]:
        batch_error, text_error = (bytes(saved[n].tolist()).decode() for n in ("batch", "text"))
        assert batch_error.startswith("the batch size differs between ranks: [3, 2] on ranks 0..1")
        assert text_error.startswith("the text length differs between ranks: [12, 9]")


def test_without_a_process_group_the_batch_is_whole():
    rows = torch.randn(3, 2, requires_grad=True)
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
    collectives.require_equal_sizes({"the batch size": 3}, rows.device)
    assert torch.equal(collectives.gather(rows), rows)
    assert not collectives.gather(rows).requires_grad
    assert collectives.gather_with_grad(rows) is rows
    assert torch.equal(collectives.exchange_rows(rows, torch.tensor([2, 2])), rows[[2, 2]])


def main(rank, folder, *tasks):
    """Be one of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        saved = {task: globals()[f"task_{task}"](int(rank)) for task in tasks}
        torch.save(saved, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
